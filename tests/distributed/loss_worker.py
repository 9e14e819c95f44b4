"""Run by torchrun: the loss kernels over shards of the vocabulary. `loss_worker.py OUT_FOLDER`

Each rank holds its part of the same weight, with rows of NaN behind it, and writes what it found to OUT/RANK.pt:
{case: (values and gradients, collectives of the forward and of the backward pass)}.
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
from perl_megatron.kernels.scores import ScoreOptions, VocabularyShard

VOCABULARY = 2 * tiles.ROWS + 501
SPLITS = {
    2: {"even": [2299, 2298], "uneven": [4096, 501], "one is empty": [4597, 0]},
    4: {"even": [1150, 1150, 1150, 1147], "uneven": [1, 2048, 0, 2548]},
}
"""World size → name → rows on each rank."""
OPTIONS = {"temperature": 0.8, "banned_token_ids": (0, 2299, 4596), "top_k": 5}
PADDING = 3


def case() -> Case:
    return make_case(tokens=tiles.TOKENS + 44, hidden=64, vocabulary=VOCABULARY, dtype=torch.float32)


def shard_of(split: list[int], rank: int) -> VocabularyShard:
    return VocabularyShard(sum(split[:rank]), split[rank], VOCABULARY, dist.group.WORLD)


def run(whole: Case, split: list[int], backend: str) -> dict[str, Any]:
    shard = shard_of(split, dist.get_rank())
    rows = whole.weight[shard.first : shard.first + shard.size]
    weight = torch.cat([rows, torch.full((PADDING, rows.shape[1]), torch.nan)]).requires_grad_()
    hidden = whole.hidden.clone().requires_grad_()
    calls = []

    def count(name: str) -> Any:
        original = getattr(dist, name)

        def counted(*arguments: Any, **others: Any) -> Any:
            calls.append(name)
            return original(*arguments, **others)

        return counted

    names = ("all_reduce", "all_gather")
    with mock.patch.multiple(dist, **{name: count(name) for name in names}):
        options = ScoreOptions(**OPTIONS)
        scores = score_tokens(hidden, weight, whole.targets, shard=shard, options=options, backend=backend)
        forward = len(calls)
        ((whole.by_log_prob * scores.log_prob).sum() + (whole.by_entropy * scores.entropy).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        **{name: value.detach() for name, value in vars(scores).items()},
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad,
        "collectives": (calls[:forward], calls[forward:]),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    whole = case()
    found = {
        f"{name}, {backend}": run(whole, split, backend)
        for name, split in SPLITS[dist.get_world_size()].items()
        for backend in ("reference", "tiled")
    }
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
