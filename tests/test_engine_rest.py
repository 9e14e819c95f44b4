"""When the engine sleeps and wakes: the loop and the session's own methods, with an engine that takes notes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from test_loop import NotingActor, drawn_group

from perl_megatron import training_session
from perl_megatron.config.schema import Config
from perl_megatron.drawn import Drawn
from perl_megatron.loop import train
from perl_megatron.observability.phases import Phases
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.training_session import TrainingSession


class NotingEngine:
    """Refuses to sample while it sleeps."""

    name = "vllm"

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.is_awake = notes, True

    def sample(self, what: str) -> None:
        assert self.is_awake
        self.notes.append(what)

    def update_weights(self, weights: object, version: int) -> SimpleNamespace:
        self.notes.append(f"weights {version}")
        self.is_awake = True
        return SimpleNamespace(seconds=0.0, num_bytes=0, num_tensors=0, attest_seconds=0.0)

    def sleep(self) -> None:
        if self.is_awake:
            self.notes.append("sleep")
        self.is_awake = False

    def wake(self) -> None:
        if not self.is_awake:
            self.notes.append("wake")
        self.is_awake = True

    def take_cache_use(self) -> CacheUse:
        return CacheUse()


class WatchingActor(NotingActor):
    """Notes whether the engine slept while the trainer worked."""

    def __init__(self, engine: NotingEngine) -> None:
        super().__init__()
        self.engine = engine

    def weights(self) -> tuple[()]:
        return ()

    def work(self, kind: str, sequences: list[Any]) -> Any:
        self.engine.notes.append(kind if not self.engine.is_awake else f"{kind} beside the engine")
        return getattr(super(), kind)(sequences)

    def log_probs(self, sequences: list[Any]) -> Any:
        return self.work("log_probs", sequences)

    def reference_log_probs(self, sequences: list[Any]) -> Any:
        return self.work("reference_log_probs", sequences)

    def update(self, sequences: list[Any]) -> Any:
        return self.work("update", sequences)


WORK = ["sleep", "log_probs", "reference_log_probs", "update"]
Draw = Callable[[int], Drawn]


def drawn_of(step: int) -> Drawn:
    return drawn_group()


@pytest.fixture
def notes_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a whole run of some steps comes to."""

    def run(draw: Draw = drawn_of, *, steps: int = 2, evaluate_every: int = 0, **rollout: Any) -> list[str]:
        notes: list[str] = []
        session = make_session(notes, draw, steps=steps, evaluate_every=evaluate_every, **rollout)
        monkeypatch.setattr(training_session, "evaluate", lambda config, records, encoder, engine: evaluation(engine))
        train(session)
        return notes

    def evaluation(engine: NotingEngine) -> SimpleNamespace:
        engine.sample("evaluate")
        return SimpleNamespace(metrics=dict, write=None)

    return run


def make_session(notes: list[str], draw: Draw, *, steps: int, evaluate_every: int, **rollout: Any) -> Any:
    """The real one, but for what writes files and for the steps' groups."""
    session: Any = object.__new__(TrainingSession)
    session.engine = NotingEngine(notes)
    session.actor = WatchingActor(session.engine)
    session.config = Config.model_validate(
        {
            "model": {"path": "unused"},
            "run": {"steps": steps},
            "rollout": rollout,
            "evaluation": {"every": evaluate_every},
            "permutation": {"schedule": "constant"},
        }
    )

    def collect(step: int, alpha: float) -> Drawn:
        session.engine.sample("generate")
        return draw(step)

    def ignore(*args: Any, **options: Any) -> None:
        pass

    session.phases, session.total_steps, session._synced_step, session._is_exhausted = Phases(), steps, -1, False
    session.evaluation_records = ["a question"] if evaluate_every else []
    evaluated: set[int] = set()
    session._journal = SimpleNamespace(
        has=lambda step, name: step in evaluated,
        evaluation=lambda step, metrics, write: evaluated.add(step),
        note=ignore,
    )
    session.collector = SimpleNamespace(collect=collect, await_rollouts=ignore, take_waits=ignore, in_progress=None)
    session._grace = SimpleNamespace(learn=ignore, is_over_before=lambda phase: False)
    session._stop = SimpleNamespace(requested=lambda agree: False)
    session.encoder, session.restore = None, lambda: 0
    session._export = lambda step: notes.append("export beside the engine" if session.engine.is_awake else "export")
    for name in ("_agree", "save", "save_if_due", "log_step", "_conclude", "_record_refused"):
        setattr(session, name, ignore)
    session._skipped = SimpleNamespace(follow=ignore)
    session.position = dict
    session.saved_on_user_error = lambda step: nullcontext()
    return session


def test_the_engine_sleeps_while_the_trainer_works_and_is_awake_for_every_question(
    notes_of: Callable[..., list[str]],
) -> None:
    """Before the first update too, as an engine that has just been started has its cache already."""
    assert notes_of() == ["sleep", "weights 0", "generate", *WORK, "weights 1", "generate", *WORK, "export"]


def test_an_evaluation_finds_the_engine_awake_and_leaves_it_so(notes_of: Callable[..., list[str]]) -> None:
    """The next step then has its weights already. The last one is followed by the export."""
    assert notes_of(evaluate_every=1) == [
        *("sleep", "weights 0", "evaluate"),
        *("generate", *WORK, "weights 1", "evaluate"),
        *("generate", *WORK, "weights 2", "evaluate", "sleep", "export"),
    ]


def test_without_sleep_mode_the_engine_keeps_its_memory(notes_of: Callable[..., list[str]]) -> None:
    work = [f"{kind} beside the engine" for kind in WORK[1:]]
    begin = ["weights 0", "generate", *work, "weights 1", "generate", *work]
    assert notes_of(sleep_mode=False) == [*begin, "export beside the engine"]


def test_a_step_that_is_interrupted_does_not_put_it_to_sleep(notes_of: Callable[..., list[str]]) -> None:
    assert notes_of(lambda step: Drawn(step, is_interrupted=True)) == ["sleep", "weights 0", "generate"]


def test_it_sleeps_for_the_export_where_the_questions_are_used_up(notes_of: Callable[..., list[str]]) -> None:
    notes = notes_of(lambda step: Drawn(step, exhausted=True, is_complete=True))
    assert notes == ["sleep", "weights 0", "generate", "sleep", "export"]


def test_a_step_without_groups_is_followed_by_one_with(notes_of: Callable[..., list[str]]) -> None:
    """As `filter.skip_empty_steps` allows."""
    begin = ["sleep", "weights 0", "generate", "sleep", "log_probs", "reference_log_probs"]
    notes = notes_of(lambda step: Drawn(step, is_complete=True) if step == 0 else drawn_group())
    assert notes == [*begin, "weights 1", "generate", *WORK, "export"]


def test_a_server_is_asked_for_no_memory(notes_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotingEngine, "name", "server")
    assert "sleep" not in notes_of(evaluate_every=1)


def test_an_engine_that_has_the_weights_is_woken() -> None:
    notes: list[str] = []
    session = make_session(notes, drawn_of, steps=1, evaluate_every=0)
    session.sync_weights(3)
    session.rest_engine(3)
    session.sync_weights(3)
    session.sync_weights(3)
    assert notes == ["sleep", "weights 3", "sleep", "wake"]
