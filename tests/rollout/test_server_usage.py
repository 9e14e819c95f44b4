"""Counters of servers that restart, fail, or say what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout.server_client import ServerFailure
from perl_megatron.rollout.server_usage import ServerUsage


class CountingClient:
    """What its counters are; an exception is raised."""

    seconds = 1.0

    def __init__(self, tokens: Any = 0, images: Any = 0):
        self.tokens, self.images = tokens, images

    def metric(self, name: str) -> float:
        assert name == "vllm:prefix_cache_hits_total"
        if isinstance(self.tokens, Exception):
            raise self.tokens
        return float(self.tokens)

    def call(self, method: str, *, seconds: float) -> Any:
        assert method == "perl_encoded_images"
        return self.images if isinstance(self.images, list) else [[self.images], [self.images]]


def usage_of(**clients: CountingClient) -> ServerUsage:
    return ServerUsage(clients)  # type: ignore[arg-type]


def test_what_was_added_since_the_last_look_over_all_servers() -> None:
    a, b = CountingClient(10, 1), CountingClient(100, 2)
    usage = usage_of(a=a, b=b)
    assert usage.take() == (110, 3)
    a.tokens, b.images = 15, 9
    assert usage.take() == (5, 7)
    assert usage.take() == (0, 0)


def test_after_a_restart_counters_begin_again() -> None:
    a = CountingClient(10, 8)
    usage = usage_of(a=a)
    usage.take()
    a.tokens, a.images = 3, 8
    assert usage.take() == (3, 8)
    a.tokens, a.images = 3, 2
    assert usage.take() == (3, 2)
    a.tokens = 4
    assert usage.take() == (1, 0)


WRONG: list[tuple[Any, Any]] = [
    (ServerFailure("dead"), 1),
    (UserError("there is no such route"), 1),
    (float("nan"), 1),
    (float("inf"), 1),
    (1, [None]),
    (1, [[]]),
    (1, [["many"]]),
    (1, [3]),
]


@pytest.mark.parametrize(("tokens", "images"), WRONG)
def test_a_server_that_cannot_be_asked_counts_nothing_and_does_not_end_the_step(tokens: Any, images: Any) -> None:
    """Only the first process asks: an error there would leave the others waiting."""
    wrong, right = CountingClient(tokens, images), CountingClient(7, 7)
    usage = usage_of(wrong=wrong, right=right)
    assert usage.take() == (7, 7)
    wrong.tokens, wrong.images = 5, 6
    assert usage.take() == (5, 6)
