"""The product's tiny Qwen2.5-VL (perl_megatron/verification) and its batch, as the tests of other parts use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perl_megatron.train.batch import MicroBatch
from perl_megatron.train.grid import lay_out_rows
from perl_megatron.verification.layout import IMAGE_TOKEN, TEXT
from perl_megatron.verification.tiny import TinyImages, tiny_sequences
from perl_megatron.verification.tiny import tiny_config as hf_config
from perl_megatron.verification.tiny import tiny_model as hf_model

__all__ = [
    "FFN",
    "HIDDEN",
    "IMAGE_TOKEN",
    "VOCABULARY",
    "WITHOUT_IMAGES",
    "hf_config",
    "hf_model",
    "micro_batch",
    "tiny_sequences",
]

VOCABULARY, HIDDEN, FFN = (TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size"))
WITHOUT_IMAGES = 4
"""A sequence of the batch that has none."""


def micro_batch(members: Sequence[int], *, length_multiple: int = 1) -> MicroBatch:
    """These sequences of the batch in one micro-batch; each image that occurs is given once."""
    return lay_out_rows(
        tiny_sequences(),
        members,
        length_multiple=length_multiple,
        pad_token_id=0,
        patches=TinyImages().patches,
        device=torch.device("cpu"),
    )
