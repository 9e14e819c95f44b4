"""The section of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from perl_megatron.config.section import Section, as_texts


class EvaluationConfig(Section):
    """Held-out evaluation, every question in several image orders; and benchmarks, in their own order."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations (0: only before and after training)."""
    num_orders: int = Field(default=4, ge=1)
    """Image orders of each question (fewer where a record has fewer); the original order is always one of them."""
    max_records: int | None = Field(default=None, ge=1)
    """Evaluate only the first so many records, of a benchmark the first so many questions; None: all."""
    num_rollouts: int = Field(default=1, ge=1)
    """Answers to each question in each order; more than one needs evaluation.temperature above 0."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling threshold."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Answers are cut at this length; None: rollout.max_response_tokens."""
    ask: Literal["engine", "endpoint"] = "engine"
    """Who answers in `perl-megatron eval`: model.path in the engine of rollout.engine, or the model behind
    endpoint.url."""
    benchmarks: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """Benchmarks that `perl-megatron eval` asks instead of data.evaluation: mantis_eval, blink, mmiu, math_vista,
    math_verse, math_vision, remi, mv_math, or all."""
    benchmark_folder: Path | None = None
    """Folder with a local copy of each benchmark, in a folder or file of its name."""
    chunk_size: int = Field(default=256, ge=1)
    """Questions of a benchmark, or views of records, that `perl-megatron eval` asks at once; after each chunk the
    answers are on the disk."""
    resume: bool = True
    """Whether an interrupted `perl-megatron eval` goes on; if not, its answers are put aside."""
