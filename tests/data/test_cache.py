"""One cache under several threads: the bound holds at every moment, and no value is another key's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from perl_megatron.data.cache import ByteBoundedCache

MAX_BYTES, THREADS, ROUNDS = 60, 4, 3000


@pytest.fixture(autouse=True)
def eager_threads() -> Iterator[None]:
    """Threads that change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def size_of(key: int, version: int) -> int:
    """Of a value: changes with every version, so that replacing one changes the sum."""
    return (7 * key + version) % 23


def test_threads_share_a_cache() -> None:
    cache: ByteBoundedCache[tuple[int, int]] = ByteBoundedCache(MAX_BYTES)

    def work(thread: int) -> list[str]:
        draw, problems = random.Random(thread), []
        for version in range(ROUNDS):
            key = draw.randrange(12)
            cache.put(key, (key, version), num_bytes=size_of(key, version))
            other = draw.randrange(12)
            found = cache.get(other)
            if found is not None and found[0] != other:
                problems.append(f"{found} lies under {other}")
        return problems

    with ThreadPoolExecutor(THREADS) as pool:
        assert [problem for problems in pool.map(work, range(THREADS)) for problem in problems] == []
    kept = [value for key in range(12) if (value := cache.get(key)) is not None]
    assert kept
    assert cache.num_bytes == sum(size_of(*value) for value in kept) <= MAX_BYTES


def test_a_value_is_replaced_and_its_bytes_are_counted_once() -> None:
    cache: ByteBoundedCache[str] = ByteBoundedCache(10)
    cache.put("a", "old", num_bytes=6)
    cache.put("a", "new", num_bytes=9)
    assert (cache.get("a"), cache.num_bytes) == ("new", 9)
    cache.put("a", "too large", num_bytes=11)
    assert (cache.get("a"), cache.num_bytes) == (None, 0)
