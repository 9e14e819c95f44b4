"""Core attention in plain torch: what megatron-core takes in place of TransformerEngine's DotProductAttention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from perl_megatron.model.context_parallel import context_part
from perl_megatron.model.segments import Segments
from perl_megatron.model.shared_prompts import SharedPrompts


class TorchCoreAttention(MegatronModule):
    """Causal attention over a batch, or attention within the segments of one packed row; grouped queries or not.

    Where the sequence is spread over context ranks, each gathers the keys and values of all for its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ):
        super().__init__(config=config)
        assert attention_type == "self", attention_type
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self.attn_mask_type = attn_mask_type
        self.context_group = None
        if config.context_parallel_size > 1:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
            self.context_group = groups.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | SharedPrompts | None = None,
    ) -> torch.Tensor:
        """[S, B, heads, D] queries, [S, B, groups, D] keys and values → [S, B, heads · D]."""
        assert attention_mask is None
        assert attention_bias is None
        if packed_seq_params is not None:
            assert query.shape[1] == 1, "segments are packed into one row"
            packed = (query[:, 0], key[:, 0], value[:, 0])
            if isinstance(packed_seq_params, SharedPrompts):
                output = self._with_shared_prompts(*packed, packed_seq_params)
            else:
                output = self._within_segments(*packed, packed_seq_params)
            return output.flatten(1).unsqueeze(1)
        causal = (attn_mask_type or self.attn_mask_type) is AttnMaskType.causal
        mask = None
        if self.context_group is not None:
            assert causal, "only causal attention is spread over context ranks"
            key, value = (self._of_all_context_ranks(tensor) for tensor in (key, value))
            mask, causal = self._context_mask(query), False
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self._attend(query, key, value, mask=mask, causal=causal).permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        causal: bool,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )  # [batch, heads, length, D]

    def _of_all_context_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values [S / size, …] → [S, …], rank after rank; going back, each rank gets the sum for its own."""
        return gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=self.context_group)

    def _context_mask(self, query: torch.Tensor) -> torch.Tensor:
        """bool [own S, S]: which of the gathered keys are not after each of this rank's queries."""
        assert self.context_group is not None
        size = self.context_group.size()
        parts = [context_part(len(query) * size, rank, size) for rank in range(size)]
        own, gathered = parts[self.context_group.rank()], np.concatenate(parts)
        return torch.from_numpy(gathered[None] <= own[:, None]).to(query.device)

    def _within_segments(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """[N, heads, D]; one call for all segments of a length: images of 28×28 pixels are thousands of 4 patches."""
        packed = (query, key, value)
        if segments.inverse is None:
            batch = (tensor.unflatten(0, (-1, segments.longest)).transpose(1, 2) for tensor in packed)
            return self._attend(*batch, causal=False).transpose(1, 2).flatten(0, 1)
        outputs = []
        for group in segments.groups:
            batch = (_gather(tensor, group) for tensor in packed)
            outputs.append(self._attend(*batch, causal=False).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, segments.inverse)

    def _with_shared_prompts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: SharedPrompts
    ) -> torch.Tensor:
        """[N, heads, D]; padding of the row gets zeros. One call for prompts, or responses, of about one length."""
        outputs = []
        for block in segments.blocks:
            q, k, v = (
                _gather(tensor, places)
                for tensor, places in ((query, block.queries), (key, block.keys), (value, block.keys))
            )
            output = self._attend(q, k, v, mask=block.mask, causal=block.mask is None)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        results = torch.cat(outputs).index_select(0, segments.place_of_result)
        return torch.nn.functional.pad(results, (0, 0, 0, 0, 0, segments.num_padding))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """No parameters, nothing to save."""
        return {}


def _gather(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[N, heads, D] at int64 [b, L] → [b, heads, L, D].

    By index_select, whose gradient is added up by a plain loop: that of indexing sorts the indices first.
    """
    return tensor.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
