import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from actor_fixtures import case, encoder, sequences, topology  # noqa: F401 - fixtures


@contextmanager
def _small_files(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_files():
    """`with small_files(n)`: the system refuses to write a file beyond n bytes, as a full disk does."""
    return _small_files
