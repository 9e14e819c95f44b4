"""A real training session, journal and checkpoints, around an actor, an engine and questions that are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from perl_megatron.checkpoint.manifest import PendingCheckpoint, latest_checkpoint
from perl_megatron.checkpoint.retention import Retention
from perl_megatron.config.load import load_config
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.topology import Topology
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.training_session import TrainingSession

ALONE = Topology(0, 1, 0, 1, 0, 1, 0, 1)


class StandInActor:
    """Its training state is what the session adds to one, in a real checkpoint folder."""

    num_updates = 0

    def prepare_save(self, directory: Path, step: int, extra: Any, retention: Retention) -> Callable[[], Path]:
        pending, state = PendingCheckpoint.begin(directory, step), json.dumps(extra)

        def write() -> Path:
            pending.write("state.txt", state)
            return pending.commit(retention)

        return write

    def newest_checkpoint(self, directory: Path, *, run: str | None) -> Path | None:
        return latest_checkpoint(directory)

    def restore(self, checkpoint: Path, *, verify: bool) -> dict[str, Any]:
        return json.loads((checkpoint / "state.txt").read_text())

    def weights(self) -> list[Any]:
        return []


class Evaluation:
    """One whose accuracy is known."""

    def __init__(self, accuracy: float):
        self._accuracy = accuracy

    def metrics(self) -> dict[str, float]:
        return {"evaluation/accuracy": self._accuracy, "evaluation/flip_rate": 0.0}

    def write(self, path: Path) -> None:
        path.write_text("answers\n")


def ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def collector() -> SimpleNamespace:
    """Of questions that nobody draws; keeps what asks whether to stop as ``asks_to_stop``."""
    stand_in = SimpleNamespace(in_progress=None, watch=ignore, close=ignore, await_rollouts=ignore, load_state=ignore)
    stand_in.stop_by = lambda asks: setattr(stand_in, "asks_to_stop", asks)
    stand_in.state = lambda: lambda: {"sampler": {}}
    stand_in.take_waits = DataWaits
    return stand_in


def engine() -> SimpleNamespace:
    """One that takes any weights."""
    report = SimpleNamespace(seconds=0.0, num_bytes=0, num_tensors=0, attest_seconds=0.0)
    return SimpleNamespace(
        name="none",
        update_weights=lambda *args, **kwargs: report,
        take_cache_use=ignore,
        sleep=ignore,
        wake=ignore,
        close=ignore,
    )


def start(stack: ExitStack, directory: Path, *overrides: str, resume: bool = False) -> TrainingSession:
    """A session of the run `directory/run`; ``stack`` closes it."""
    loaded = load_config(None, ["model.path=unused", f"run.directory={directory}", *overrides])
    watchdog = stack.enter_context(Watchdog({}, rank=0, world_size=1))
    session = TrainingSession(
        loaded,
        ALONE,
        StandInActor(),  # type: ignore[arg-type]
        SimpleNamespace(image=None, encode=None, take_waits=DataWaits),  # type: ignore[arg-type]
        SimpleNamespace(prepare=ignore),  # type: ignore[arg-type]
        total_steps=loaded.config.run.steps,
        resume=resume,
        stop=stack.enter_context(StopRequest()),
        memory=PeakMemory(),
        watchdog=watchdog,
        engine=engine(),
        collector=collector(),
        evaluation_records=(SimpleNamespace(),),
    )
    stack.callback(session.close)
    return session
