"""The policy: a Qwen2.5-VL on megatron-core's GPTModel, for one model chunk of a pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule

from perl_megatron.config.layout import check_split, stage_layers
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.model import transformer_configs
from perl_megatron.model.architecture import Architecture
from perl_megatron.model.layer_specs import block_spec, choose_provider
from perl_megatron.model.shared_prompts import SharedPrompts
from perl_megatron.model.vision import VisionModel
from perl_megatron.runtime import platform
from perl_megatron.runtime.topology import Topology


@dataclass
class VisionInput:
    """The images of a micro-batch: U unique images, M image-pad positions."""

    patches: torch.Tensor
    """float32 [N, 1176]: the patches of the unique images, one image after the other."""
    grids: torch.Tensor
    """int64 [U, 3]: (time, height, width) of each in patches."""
    feature_index: torch.Tensor
    """int64 [M]: for each image-pad position, the row of the merged features [N / 4] that goes there."""
    image_places: torch.Tensor
    """int64 [M]: the image-pad positions, counted row by row of [B, S]. A sampled image-pad token is text: not here."""


class Policy(MegatronModule):
    """One pipeline stage: the first holds the vision tower and the embedding, the last the output weight.

    The product of the two belongs to the loss (``kernels``): logits of all tokens at once are never made.

    With ``parallel.virtual_pipeline`` above 1 it is the 0-based ``chunk`` of the stage's chunks.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: ModelConfig,
        parallel: ParallelConfig,
        topology: Topology,
        chunk: int = 0,
    ):
        config = transformer_configs.language_config(architecture, model, parallel)
        super().__init__(config=config)
        self.architecture = architecture
        # megatron-core's schedules and gradient reduction ask for these by name.
        self.pre_process = topology.is_first_stage and chunk == 0
        self.post_process = topology.is_last_stage and chunk == parallel.virtual_pipeline - 1
        self.share_embeddings_and_output_weights = architecture.tied_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk if parallel.virtual_pipeline > 1 else None
        provider = choose_provider(config.params_dtype)
        self.vision_model = None
        if self.pre_process:
            self.vision_model = VisionModel(
                transformer_configs.vision_config(architecture, model, parallel),
                transformer_configs.merger_config(architecture, model, parallel),
                architecture,
                provider,
                topology,
            )
        layers = stage_layers(parallel, architecture.num_layers)[topology.pipeline_rank] // parallel.virtual_pipeline
        self.language_model = GPTModel(
            config,
            block_spec(provider, layers, mask=AttnMaskType.causal),
            vocab_size=architecture.padded_vocabulary(parallel.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="mrope",
            rotary_base=architecture.rope_theta,
            scatter_embedding_sequence_parallel=False,  # the image features go in first
            vp_stage=self.vp_stage,
        )
        # The positions that come in are those of this context rank; megatron-core would take its part of them again.
        self.language_model.rotary_pos_emb.cp_group = None

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the previous stage's hidden states (called by megatron-core's schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied matrix of this stage (called by megatron-core's gradient reduction)."""
        return self.language_model.shared_embedding_or_output_weight()

    def output_weight(self) -> torch.nn.Parameter:
        """[rows, H] of the last stage: this rank's rows of the output layer, or of the embedding where they are tied.

        Rows behind the vocabulary fill it up to a multiple of the tensor-parallel size, and mean nothing.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.language_model.output_layer.weight
        assert isinstance(weight, torch.nn.Parameter), "only the last pipeline stage has an output weight"
        return weight

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        vision: VisionInput | None = None,
        output_places: torch.Tensor | None = None,
        shared_prompts: SharedPrompts | None = None,
    ) -> torch.Tensor:
        """Final hidden states of the wanted positions, or the hidden states for the next stage.

        ``token_ids`` int64 [B, S], padded on the right; ``position_ids`` int64 [3, B, S]; ``vision`` for the first
        stage, None without images; ``output_places`` int64 [T], positions counted row by row of [B, S], any number of
        times each, None for all. Attention is causal within each row, or, where B = 1, as ``shared_prompts`` says; with
        sequence parallelism S must be a multiple of the tensor-parallel size. With context parallelism all of them are
        this rank's part of the sequences, as ``context_parallel.context_part`` cuts it, and S is the part's length.
        Returns on the last stage hidden states [T, H], normed, the same on all tensor-parallel ranks, whose gradients
        must be too; else [S, B, H] ([S / tp, B, H] if sequence-parallel).
        """
        embedded = self._embed(token_ids, vision) if self.pre_process else None
        language = self.language_model
        angles = language.rotary_pos_emb(position_ids, language.mrope_section)
        assert len(angles) == position_ids.shape[2], "megatron-core has cut the rotary angles a second time"
        hidden = language.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=shared_prompts
        )
        return self._select(hidden, output_places) if self.post_process else hidden

    def _embed(self, token_ids: torch.Tensor, vision: VisionInput | None) -> torch.Tensor:
        """[S, B, H], image features in place; this rank's part of S if sequence-parallel."""
        embedded = self.language_model.embedding(input_ids=token_ids, position_ids=None)
        if vision is not None:
            assert self.vision_model is not None
            features = self.vision_model(vision.patches, vision.grids)
            # An image's features go to several places, and their gradients are added up in its one.
            features = features.index_select(0, vision.feature_index).to(embedded.dtype)
            length, rows = embedded.shape[:2]
            places = vision.image_places % length * rows + vision.image_places // length
            embedded = embedded.flatten(0, 1).index_copy(0, places, features).view_as(embedded)
        if self.config.sequence_parallel:
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded)
        return embedded

    def _select(self, hidden: torch.Tensor, output_places: torch.Tensor | None) -> torch.Tensor:
        if self.config.sequence_parallel:
            # The gradient that comes back is whole on every rank, so each takes only its part of it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        tokens = hidden.transpose(0, 1).flatten(0, 1)
        return tokens if output_places is None else tokens.index_select(0, output_places)


def build_policy(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, topology: Topology
) -> list[Policy]:
    """This rank's model chunks, one for each virtual stage, on its device.

    Norm weights are 1; all other weights are uninitialised until ``checkpoint.stream.import_weights``. With
    ``model.dtype`` bfloat16 parameters and activations are bfloat16 throughout: no Float16Module stands between, the
    policy casts its own inputs, and ``kernels`` makes float32 of the logits.
    Raises UserError where the model does not split evenly.
    """
    check_split(parallel, architecture.numbers)
    chunks = []
    for chunk in range(parallel.virtual_pipeline):
        policy = Policy(architecture, model, parallel, topology, chunk).to(platform.device())
        for parameter in policy.parameters():
            assert parameter.dtype == policy.config.params_dtype, parameter.dtype
        chunks.append(policy)
    return chunks
