"""S10: on the CPU, rotary angles are applied by one autograd function, with their cosines and sines computed once.

megatron-core (0.16; models/common/embeddings/rope_utils.py) computes both again for queries and keys of every layer,
and joins each result with an empty remainder by a copy. TransformerEngine's kernel does it on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Call once, before any forward pass."""
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    original = rope_utils._apply_rotary_pos_emb_bshd
    last = _LastAngles()

    def apply(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        plain = not rotary_interleaved and not multi_latent_attention and mscale == 1.0
        # Tensors of inference mode have no version, and cannot be kept for a backward pass.
        plain = plain and not freqs.requires_grad and not freqs.is_inference() and not torch.is_inference_mode_enabled()
        if plain and freqs.shape[-1] == t.shape[-1]:
            return _Rotation.apply(t, *last.cos_sin(freqs, t.dtype))
        return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale)

    rope_utils._apply_rotary_pos_emb_bshd = apply


class _LastAngles:
    """Cosines and sines of the angles that were last asked for: all layers of a pass are given the same tensor."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None

    def cos_sin(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin with its first half negated), in ``dtype``."""
        last = self._last
        if last is None or last[0] is not angles or last[1] != angles._version or last[2].dtype != dtype:
            first, second = angles.sin().to(dtype).chunk(2, dim=-1)
            last = (angles, angles._version, angles.cos().to(dtype), torch.cat((-first, second), dim=-1))
            self._last = last
        return last[2:]


class _Rotation(torch.autograd.Function):
    """t · cos + swap(t) · sin, where swap exchanges the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _swap(t).mul_(sin).addcmul_(t, cos)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _swap(gradient * sin).addcmul_(gradient, cos), None, None


def _swap(t: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)
