"""Run by torchrun: the loss kernels over shards of the vocabulary. `loss_worker.py OUT_FOLDER`

Each rank holds its part of the same weight, with rows of NaN behind it, and writes what it found to OUT/RANK.pt:
{case: values, gradients, collectives of the forward and of the backward pass}. Some tokens are ignored; in bfloat16 the
weight's gradient goes to a float32 buffer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from loss_case import Case, make_case

from perl_megatron.kernels import tiles
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.divergence import exact_kl
from perl_megatron.kernels.scores import IGNORED, ScoreOptions, VocabularyShard

VOCABULARY = 2 * tiles.ROWS + 501
SPLITS = {
    2: {"even": [2299, 2298], "uneven": [4096, 501], "one is empty": [4597, 0]},
    4: {"even": [1150, 1150, 1150, 1147], "uneven": [1, 2048, 0, 2548]},
}
"""World size → name → rows on each rank."""
OPTIONS = {"temperature": 0.8, "banned_token_ids": (0, 2299, 4596), "top_k": 5}
PADDING = 3
RUNS = [("reference", "float32"), ("tiled", "float32"), ("tiled", "bfloat16")]


def case(dtype: torch.dtype) -> Case:
    made = make_case(tokens=2 * tiles.FEW_TOKENS + 44, hidden=64, vocabulary=VOCABULARY, dtype=dtype)
    made.targets[[3, 50]] = IGNORED
    return made


def other_policy(dtype: torch.dtype) -> Case:
    return make_case(tokens=2 * tiles.FEW_TOKENS + 44, hidden=32, vocabulary=VOCABULARY, dtype=dtype)


def shard_of(split: list[int], rank: int) -> VocabularyShard:
    return VocabularyShard(sum(split[:rank]), split[rank], VOCABULARY, dist.group.WORLD)


def part_of(weight: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    rows = weight[shard.first : shard.first + shard.size]
    return torch.cat([rows, rows.new_full((PADDING, rows.shape[1]), torch.nan)])


def run(whole: Case, split: list[int], backend: str) -> dict[str, Any]:
    shard = shard_of(split, dist.get_rank())
    weight = part_of(whole.weight, shard).requires_grad_()
    hidden = whole.hidden.clone().requires_grad_()
    buffer = None if weight.dtype is torch.float32 else torch.zeros(weight.shape)
    calls = []

    def count(name: str) -> Any:
        original = getattr(dist, name)

        def counted(*arguments: Any, **others: Any) -> Any:
            calls.append(name)
            return original(*arguments, **others)

        return counted

    names = ("all_reduce", "all_gather")
    with mock.patch.multiple(dist, **{name: count(name) for name in names}):
        options = ScoreOptions(**OPTIONS, gradient_buffer=buffer)
        scores = score_tokens(hidden, weight, whole.targets, shard=shard, options=options, backend=backend)
        forward = len(calls)
        ((whole.by_log_prob * scores.log_prob).sum() + (whole.by_entropy * scores.entropy).sum()).backward()
    assert hidden.grad is not None
    assert (weight.grad is None) == (buffer is not None)
    return {
        **{name: value.detach() for name, value in vars(scores).items()},
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad if buffer is None else buffer,
        "collectives": (calls[:forward], calls[forward:]),
    }


def divergence(split: list[int], dtype: torch.dtype) -> torch.Tensor:
    shard = shard_of(split, dist.get_rank())
    policies = [(each.hidden, part_of(each.weight, shard)) for each in (case(dtype), other_policy(dtype))]
    return exact_kl(*policies, case(dtype).targets, shard=shard, options=ScoreOptions(**OPTIONS))


def poisoned(split: list[int]) -> torch.Tensor:
    """Which targets are on top, where a weight of the last rank is not a number."""
    whole, shard = case(torch.float32), shard_of(split, dist.get_rank())
    whole.weight[VOCABULARY - 1] = torch.nan
    return score_tokens(whole.hidden, part_of(whole.weight, shard), whole.targets, shard=shard).is_top


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, split in SPLITS[dist.get_world_size()].items():
        for backend, dtype in RUNS:
            found[f"{name}, {backend}, {dtype}"] = run(case(getattr(torch, dtype)), split, backend)
        found[f"{name}, divergence"] = divergence(split, torch.float32)
        found[f"{name}, poisoned"] = poisoned(split)
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
