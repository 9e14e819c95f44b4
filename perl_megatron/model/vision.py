"""The vision tower of Qwen2.5-VL on megatron-core: patches → window and full attention → merged cells."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from perl_megatron.model.architecture import Architecture
from perl_megatron.model.layer_specs import block_spec
from perl_megatron.model.segments import Grid, VisionSegments, vision_plan
from perl_megatron.model.vision_shares import exchange, mark_partial_gradients, share_images
from perl_megatron.runtime.topology import Topology


class VisionLayer(TransformerLayer):
    """A block that attends over its windows, or over whole images where it is one of the full-attention blocks."""

    def forward(self, *args: Any, packed_seq_params: VisionSegments, **kwargs: Any) -> Any:
        """megatron-core's forward with the segments of this block (``layer_number`` is 1-based)."""
        segments = packed_seq_params.of_block(self.layer_number - 1)
        return super().forward(*args, packed_seq_params=segments, **kwargs)


class VisionModel(MegatronModule):
    """An image's features do not depend on the other images.

    Tensor-parallel over heads and feed-forward columns; or whole on every tensor-parallel rank, each of which encodes
    its share of the images (``vision_shares``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        merger_config: TransformerConfig,
        architecture: Architecture,
        provider: BackendSpecProvider,
        topology: Topology,
    ):
        super().__init__(config=config)
        self.vision = vision = architecture.vision
        self.numbers = architecture.numbers
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self._sharing_group = None
        if topology.vision_group is not None:
            groups.tp = topology.vision_group
            self._sharing_group = topology.tensor_group()
        # The published Conv3d has stride = kernel size, so it is a matrix product on the flattened patch.
        self.patch_embed = torch.nn.Linear(
            vision.patch_values, vision.hidden_size, bias=False, dtype=config.params_dtype
        )
        spec = block_spec(provider, vision.depth, mask=AttnMaskType.no_mask, layer=VisionLayer)
        self.decoder = TransformerBlock(config, spec, pg_collection=groups)  # its final norm is the merger's ln_q
        self.projection = MultimodalProjector(
            merger_config,
            MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()),
            "mlp",
            vision.hidden_size * vision.merge_size**2,
            tp_group=groups.tp,
        )
        if self._sharing_group is not None:
            mark_partial_gradients(self, self._sharing_group)

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Features of each merged cell.

        ``patches`` float32 [N, 1176], image after image, in 2×2 merge blocks; ``grids`` int64 [U, 3].
        Returns [N / 4, out_hidden_size] in the same order. Where the tower is replicated, the tensor-parallel ranks
        must call it together, with the same images.
        """
        images = tuple(tuple(grid) for grid in grids.tolist())
        group = self._sharing_group
        if group is None:
            return self._encode(patches, images)
        share = share_images(images, self.numbers, group.rank(), group.size()).to(patches.device)
        if share.images:
            own = patches.unflatten(0, (-1, self.vision.merge_size**2))[share.cells].flatten(0, 1)
            features = self._encode(own, tuple(images[image] for image in share.images))
        else:
            features = self._no_features(patches.device)
        return exchange(features, share, group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """megatron-core's; of a replicated tower one tensor-parallel rank is the writer, and the others have copies."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._sharing_group is not None:
            for saved in state.values():
                pipeline, _, data = saved.replica_id
                saved.replica_id = (pipeline, self._sharing_group.rank(), data)
        return state

    def _no_features(self, device: torch.device) -> torch.Tensor:
        """[0, out_hidden_size], with a gradient where the other ranks' features have one.

        What follows has collectives on its way back, in which no rank may be missing.
        """
        trained = any(parameter.requires_grad for parameter in self.parameters())
        shape = (0, self.vision.out_hidden_size)
        return torch.zeros(shape, dtype=self.config.params_dtype, device=device, requires_grad=trained)

    def _encode(self, patches: torch.Tensor, images: tuple[Grid, ...]) -> torch.Tensor:
        plan = vision_plan(images, self.vision).to(patches.device)
        cell = self.vision.merge_size**2
        hidden = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        hidden = hidden.unflatten(0, (-1, cell))[plan.order].flatten(0, 1)
        hidden = self.decoder(
            hidden_states=hidden.unsqueeze(1),
            attention_mask=None,
            rotary_pos_emb=plan.angles,
            packed_seq_params=plan.segments,
        )
        return self.projection(hidden.reshape(plan.order.shape[0], -1))[plan.inverse]
