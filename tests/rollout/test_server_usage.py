"""Counters of servers that restart, fail, come late, or say what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout.server_client import Misfit, ServerFailure
from perl_megatron.rollout.server_usage import SECONDS, ServerUsage


class CountingClient:
    """What its counters are; an exception is raised."""

    def __init__(self, address: str, tokens: Any = 0, images: Any = 0):
        self.address, self.tokens, self.images = address, tokens, images

    def metric(self, name: str, *, seconds: float) -> float:
        assert (name, seconds) == ("vllm:prefix_cache_hits_total", SECONDS)
        if isinstance(self.tokens, Exception):
            raise self.tokens
        return float(self.tokens)

    def call(self, method: str, *, seconds: float) -> Any:
        assert (method, seconds) == ("perl_encoded_images", SECONDS)
        return self.images if isinstance(self.images, list) else [[self.images], [self.images]]


def begun(*clients: CountingClient) -> ServerUsage:
    usage = ServerUsage()
    usage.begin(clients)  # type: ignore[arg-type]
    return usage


def end(usage: ServerUsage, *clients: CountingClient) -> tuple[int, int]:
    return usage.end(clients)  # type: ignore[arg-type]


def test_what_was_added_meanwhile_over_all_servers() -> None:
    a, b = CountingClient("a", 10, 1), CountingClient("b", 100, 2)
    usage = begun(a, b)
    assert end(usage, a, b) == (0, 0)
    a.tokens, b.tokens, b.images = 15, 101, 9
    assert end(usage, b, a) == (6, 7)


def test_every_beginning_counts_anew() -> None:
    a = CountingClient("a", 10, 1)
    usage = begun(a)
    a.tokens = 15
    usage.begin([a])  # type: ignore[list-item]
    a.tokens = 17
    assert end(usage, a) == (2, 0)


@pytest.mark.parametrize(("tokens", "images"), [(3, 20), (20, 7)])
def test_a_server_that_was_restarted_meanwhile_counts_nothing(tokens: int, images: int) -> None:
    """Its counters began again: what it did before is not known."""
    restarted, well = CountingClient("a", 10, 8), CountingClient("b", 0, 0)
    usage = begun(restarted, well)
    restarted.tokens, restarted.images, well.tokens, well.images = tokens, images, 5, 6
    assert end(usage, restarted, well) == (5, 6)


def test_only_servers_that_are_there_at_both_ends_count() -> None:
    gone, stays, late = CountingClient("a", 1, 1), CountingClient("b", 1, 1), CountingClient("c", 1000, 1000)
    usage = begun(gone, stays)
    stays.tokens, stays.images = 3, 4
    assert end(usage, stays, late) == (2, 3)


def test_nobody_counts_nothing() -> None:
    """As on every process but the first."""
    assert end(begun()) == (0, 0)


WRONG: list[tuple[Any, Any]] = [
    (ServerFailure("dead"), 1),
    (Misfit(UserError("there is no such route")), 1),
    (RuntimeError("the client has been closed"), 1),
    (float("nan"), 1),
    (float("inf"), 1),
    (1, [None]),
    (1, [[]]),
    (1, [["many"]]),
    (1, [3]),
]


@pytest.mark.parametrize("is_wrong_first", [True, False])
@pytest.mark.parametrize(("tokens", "images"), WRONG)
def test_a_server_that_cannot_be_asked_counts_nothing_and_does_not_end_the_step(
    tokens: Any, images: Any, is_wrong_first: bool
) -> None:
    """Only the first process asks: an error there would leave the others waiting."""
    wrong, right = CountingClient("a", 0, 0), CountingClient("b", 0, 0)
    if is_wrong_first:
        wrong.tokens, wrong.images = tokens, images
    usage = begun(wrong, right)
    wrong.tokens, wrong.images = (100, 100) if is_wrong_first else (tokens, images)
    right.tokens, right.images = 7, 8
    assert end(usage, wrong, right) == (7, 8)
