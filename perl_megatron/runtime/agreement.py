"""Before the ranks do something together, they make sure that it is the same thing.

A rank that has taken another way than the others would hang in the next collective, or mix its numbers into theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from perl_megatron.runtime import collective


class DivergedError(RuntimeError):
    """Ranks are about to do different things; which ranks, and what differs."""


class Agreement:
    """Compares what the ranks are about to do, over a group that nothing else uses. Collective, all of it.

    So whatever a rank is about to do, here it meets the others: in one sum of two numbers, where all is well.

    Args:
        timeout_seconds: how long is waited for a rank that does not come.
    """

    def __init__(self, timeout_seconds: float):
        self._group = collective.new_group(timeout_seconds)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raise DivergedError, on all ranks, unless ``facts`` (JSON) are equal on all."""
        if self._group is None:
            return
        text = json.dumps(facts, sort_keys=True)
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        ends = torch.tensor([digest, -digest])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        if ends[0] == -ends[1]:
            return
        with collective.over(self._group):
            facts_of_ranks = [json.loads(found) for found in collective.gather_objects(text)]
        raise DivergedError("the ranks have diverged:\n" + "\n".join(_differences(facts_of_ranks)))


def _differences(facts_of_ranks: list[dict[str, Any]]) -> list[str]:
    """A line for each fact that differs: its values, each with its ranks."""
    lines = []
    for name in sorted(set().union(*facts_of_ranks)):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(facts_of_ranks):
            ranks.setdefault(json.dumps(facts.get(name)), []).append(rank)
        if len(ranks) > 1:
            values = "; ".join(f"{value} on {_ranks(numbers)}" for value, numbers in ranks.items())
            lines.append(f"  {name}: {values}")
    return lines


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
