"""Fixtures of a tiny policy's actor in one process, once for each file of tests: a conftest takes them in by import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from actor_case import make_case, make_encoder, make_sequences

from perl_megatron.config.schema import ParallelConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.runtime import topology as layout
from perl_megatron.train.batch import TrainingSequence

__all__ = ["case", "encoder", "sequences", "topology"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of policy and questions."""
    folder = tmp_path_factory.mktemp("case")
    make_case(folder)
    return folder


@pytest.fixture(scope="module")
def topology() -> Iterator[layout.Topology]:
    """Of one process."""
    yield layout.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    layout.shutdown()


@pytest.fixture(scope="module")
def encoder(case: Path) -> PromptEncoder:
    return make_encoder(case)


@pytest.fixture
def sequences(case: Path, encoder: PromptEncoder) -> list[TrainingSequence]:
    return make_sequences(case, encoder)
