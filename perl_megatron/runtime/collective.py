"""Small agreements between ranks: sharing work on Python objects, and deciding together.

All functions also work in one process without an initialised process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from perl_megatron.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group of these agreements", default=None)


def new_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    """A group of all ranks for agreements of another thread, by all ranks together; None in one process.

    Two threads must not use one group: the ranks' calls would meet in another order.
    """
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


@contextmanager
def over(group: dist.ProcessGroup | None) -> Iterator[None]:
    """All agreements of this thread within the block go over ``group``."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def rank() -> int:
    """This process's global rank (0 without a process group)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shared_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[function(item) for item in items]`` on every rank, each rank computing its share.

    ``function`` may be non-deterministic (a deadline, say): every rank gets the one result that one rank computed. A
    UserError that one rank meets is raised by all, as by ``together``.
    """
    return shared_batches(lambda mine: [function(item) for item in mine], items)


def shared_batches(function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """``shared_map`` for a function of many items: each rank calls it once, with its share."""
    return interleave(gather_objects(_share(function, items)), len(items))


def shared_map_on_rank_zero(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result] | None:
    """As ``shared_map``, on rank 0 alone; None elsewhere. For what is large: the others need not unpack it."""
    shares = gather_on_rank_zero(_share(lambda mine: [function(item) for item in mine], items))
    return None if shares is None else interleave(shares, len(items))


def _share(function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> Sequence[Result]:
    return together(lambda: function(items[rank() :: world_size()]))


def together(work: Callable[[], Result]) -> Result:
    """What ``work`` returns on this rank, unless a rank could not do it. Collective; ``work`` itself need not be.

    Raises:
        UserError: that of the lowest rank that met one, on every rank, so that none waits for one that gave up.
    """
    if world_size() == 1:
        return work()
    outcome: Result | UserError
    try:
        outcome = work()
    except UserError as error:
        outcome = error
    for met in gather_objects(outcome if isinstance(outcome, UserError) else None):
        if met is not None:
            raise met
    assert not isinstance(outcome, UserError)
    return outcome


def gather_objects(mine: Result) -> list[Result]:
    """The objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [mine]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, mine, group=_group.get())
    return gathered


def gather_on_rank_zero(mine: Result) -> list[Result] | None:
    """As ``gather_objects``, on rank 0 alone; None elsewhere."""
    if world_size() == 1:
        return [mine]
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(mine, gathered, dst=0, group=_group.get())
    return gathered


def from_rank_zero(work: Callable[[], Result]) -> Result:
    """What ``work`` returns on rank 0, on every rank: what ranks may see otherwise (files, above all) is seen once.

    Collective; ``work`` itself must not be. Raises, on every rank, the UserError or OSError that rank 0 meets.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [work()]
        except (UserError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=_group.get())
    if isinstance(outcome[0], UserError | OSError):
        raise outcome[0]
    return outcome[0]


def interleave(shares: Sequence[Sequence[Result]], total: int) -> list[Result]:
    """The inverse of giving share ``r`` the items ``r, r + R, r + 2R, …``."""
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank; the same answer on all."""
    return any(gather_objects(flag))


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        group = _group.get()
        token = torch.zeros(1, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
        dist.all_reduce(token, group=group)
