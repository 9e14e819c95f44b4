"""The vision tower of Qwen2.5-VL on megatron-core: patches → window and full attention → merged cells."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from perl_megatron.model.architecture import VisionArchitecture
from perl_megatron.model.layer_specs import block_spec
from perl_megatron.model.segments import VisionSegments, vision_plan


class VisionLayer(TransformerLayer):
    """A block that attends over its windows, or over whole images where it is one of the full-attention blocks."""

    def forward(self, *args: Any, packed_seq_params: VisionSegments, **kwargs: Any) -> Any:
        """megatron-core's forward with the segments of this block (``layer_number`` is 1-based)."""
        segments = packed_seq_params.of_block(self.layer_number - 1)
        return super().forward(*args, packed_seq_params=segments, **kwargs)


class VisionModel(MegatronModule):
    """Tensor-parallel over heads and feed-forward columns. An image's features do not depend on the other images."""

    def __init__(
        self,
        config: TransformerConfig,
        merger_config: TransformerConfig,
        vision: VisionArchitecture,
        provider: BackendSpecProvider,
    ):
        super().__init__(config=config)
        self.vision = vision
        # The published Conv3d has stride = kernel size, so it is a matrix product on the flattened patch.
        self.patch_embed = torch.nn.Linear(
            vision.patch_values, vision.hidden_size, bias=False, dtype=config.params_dtype
        )
        spec = block_spec(provider, vision.depth, mask=AttnMaskType.no_mask, layer=VisionLayer)
        self.decoder = TransformerBlock(config, spec)  # its final norm is the merger's ln_q
        self.projection = MultimodalProjector(
            merger_config,
            MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()),
            "mlp",
            vision.hidden_size * vision.merge_size**2,
        )

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Features of each merged cell.

        ``patches`` float32 [N, 1176], image after image, in 2×2 merge blocks; ``grids`` int64 [U, 3].
        Returns [N / 4, out_hidden_size] in the same order.
        """
        plan = vision_plan(tuple(tuple(grid) for grid in grids.tolist()), self.vision).to(patches.device)
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
