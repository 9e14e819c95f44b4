"""What the colocated engine asks of vLLM around its sleep. A stand-in for `vllm.LLM` notes it; nothing is said of GPUs.

That vLLM itself takes these calls is seen in test_engine_contract.py, on a CPU, where it goes through the same states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.rollout import vllm_colocated, vllm_start
from perl_megatron.rollout.vllm_colocated import VllmColocatedEngine
from perl_megatron.runtime import platform


class NotingLLM:
    """Keeps the rule of vLLM's executor: a call that names a tag that does not sleep takes nothing."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.sleeping: set[str] = set()
        self.is_scheduling = True
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: None)
        self.reset_mm_cache = lambda: None

    def sleep(self, level: int) -> None:
        self.notes.append(("sleep", level))
        self.is_scheduling = False
        if level == 1:
            self.sleeping = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.notes.append(("wake_up", *tags))
        memory = set(tags) - {"scheduling"}
        if memory <= self.sleeping:
            self.sleeping -= memory
        self.is_scheduling = self.is_scheduling or not self.sleeping

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        assert "weights" not in self.sleeping
        assert not self.is_scheduling
        self.notes.append((name, [each for each, _ in kwargs["weights_iterator"]]))

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a machine that says it has CUDA, of a model with one weight, without attestation."""
    engine: Any = object.__new__(VllmColocatedEngine)
    engine._llm = llm = NotingLLM()
    engine._names, engine._dtype, engine._tied = frozenset({"w"}), torch.float32, False
    engine._attestor, engine._model, engine._given_back, engine._num_updates = None, None, (), 0
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: llm.notes.append("empty_cache"))
    monkeypatch.setattr(vllm_colocated, "preserved_process", nullcontext)
    monkeypatch.setattr(vllm_colocated.vllm_holdings, "renew_output_layer", lambda model, tied: None)
    return engine


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    yield "w", torch.zeros(2)


RELOAD = ("reload_weights", ["w"])


def test_a_sleeping_engine_takes_the_weights_then_the_cache(engine: Any) -> None:
    engine.sleep()
    engine.update_weights(weights(), version=3)
    assert engine._llm.notes == [
        ("sleep", 1),
        *("empty_cache", ("wake_up", "weights"), ("sleep", 0), RELOAD),
        *("empty_cache", ("wake_up", "kv_cache"), ("wake_up", "scheduling")),
    ]
    assert not engine._llm.sleeping
    assert engine._llm.is_scheduling


def test_an_awake_engine_only_stops_for_the_update(engine: Any) -> None:
    engine.update_weights(weights(), version=3)
    assert engine._llm.notes == [("sleep", 0), RELOAD, ("wake_up", "scheduling")]
    assert engine._llm.is_scheduling


def test_it_sleeps_and_wakes_once(engine: Any) -> None:
    for _ in range(2):
        engine.sleep()
    for _ in range(2):
        engine.wake()
    asked = [note for note in engine._llm.notes if note not in ("empty_cache", ("wake_up", "scheduling"))]
    assert asked == [("sleep", 1), ("wake_up", "weights", "kv_cache")]
    assert not engine._llm.sleeping
    assert engine._llm.is_scheduling


def test_an_update_that_fails_half_awake_can_be_made_again(engine: Any) -> None:
    engine.sleep()
    with pytest.raises(ValueError, match="did not come"):
        engine.update_weights(iter(()), version=3)
    assert engine._llm.sleeping == {"kv_cache"}
    engine.update_weights(weights(), version=3)
    assert not engine._llm.sleeping
    assert engine._llm.is_scheduling


def test_a_sleeping_engine_neither_samples_nor_reads(engine: Any) -> None:
    engine.sleep()
    with pytest.raises(AssertionError, match="asleep"):
        engine.generate([], [], None, seeds=[])
    with pytest.raises(AssertionError, match="asleep"):
        engine.digest()


@pytest.mark.parametrize("sleep_mode", [True, False])
def test_vllm_is_started_with_sleep_mode_where_it_is_wanted(engine: Any, sleep_mode: bool) -> None:
    encoder: Any = SimpleNamespace(min_pixels=1, max_pixels=2)
    arguments = vllm_start.arguments(
        RolloutConfig(sleep_mode=sleep_mode),
        encoder=encoder,
        model_path=Path("policy"),
        seed=0,
        dtype=torch.bfloat16,
        max_model_length=64,
        max_images=1,
    )
    assert arguments["enable_sleep_mode"] is sleep_mode
