"""Floating-point operations of a group's step: those that a pass really does, and the fewest that it needs.

A multiplication and an addition are two operations. Matrix products and attention count, as torch's own counter sees
them in a real pass. An attention kernel is charged for the pairs of query and key that it works on: half of the
rectangle where it knows that the mask is causal, all of it where it is handed a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.work import views_of
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.train.batch import TrainingSequence

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Of an attention kernel. One of those backward is computed for the second time: the scores."""


def attention_product(query: Sequence[int], key: Sequence[int], *, causal: bool) -> int:
    """Operations of one product over the pairs of queries [batch, heads, Q, D] and keys [batch, groups, K, D].

    Causal as torch has it: the first query sees the first key.
    """
    batch, heads, num_queries, dim = query
    num_keys = key[2]
    pairs = sum(min(row + 1, num_keys) for row in range(num_queries)) if causal else num_queries * num_keys
    return 2 * batch * heads * pairs * dim


def _forward(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return FORWARD_PRODUCTS * attention_product(query, key, causal=causal)


def _backward(
    gradient: Any, query: Any, key: Any, value: Any, out: Any, log_sum: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return BACKWARD_PRODUCTS * attention_product(query, key, causal=causal)


def _product_added(total: Any, first: Any, second: Any, **_: Any) -> int:
    return 2 * math.prod(first) * second[-1]


MORE_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten.addmm_: _product_added,
    torch.ops.aten.baddbmm_: _product_added,
}
"""Of shapes. torch's own know the GPU's attention kernels only, and no product that adds up in place."""


def count(run: Callable[[], Any]) -> int:
    """What ``run`` does, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counter:
        run()
    return int(counter.get_total_flops())


def minimum(sequences: Sequence[TrainingSequence], policy: Path) -> int:
    """What a step of these sequences needs at least, by formula, forward and backward.

    Each distinct image is encoded once, each distinct prompt run once, and each response once, as far as the loss needs
    it. Nothing that a mask hides is computed, and nothing again but the loss's logits (``batching/cost.py``).
    """
    views = views_of([each.prompt for each in sequences], [len(each.response) for each in sequences])
    return CostModel(read_architecture_numbers(policy), "full").flops(views).total
