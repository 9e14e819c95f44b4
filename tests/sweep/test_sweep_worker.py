"""One worker and what it finds in the study; no run is started."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from sweep_case import SweepCase, make_case

from perl_megatron.errors import UserError
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.storage import point_of, put_back_unfinished
from perl_megatron.sweep.study import QUEUE_LOCK, make_sampler, open_study, suggest
from perl_megatron.sweep.worker import Worker, _TakenAwayError

SPACE = """
  sampler: random
  trials: 3
  {storage}
space:
  optimizer.learning_rate: {{low: 1.0e-6, high: 1.0e-2, log: true}}
"""

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat")


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepCase:
    monkeypatch.chdir(Path(__file__).parents[2])
    return make_case(tmp_path, SPACE.format(storage=""))


def test_a_worker_that_was_stopped_before_it_had_the_folder(case: SweepCase) -> None:
    """Another one took its trial meanwhile, and has left the folder: the lock is free, the trial not its own."""
    with StopRequest() as stop:
        worker = Worker(case.sweep, stop)
        trial = worker._study.ask()
        lock = FileLock(case.sweep.folder / "point-0000" / "run.lock")
        worker._await_run(lock, trial)
        lock.release()
        worker._study.tell(trial.number, state=TrialState.FAIL)
        with pytest.raises(_TakenAwayError):
            worker._await_run(lock, trial)
        lock.close()


def test_a_random_point_has_its_values_whoever_begins_it_last(case: SweepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first worker died before the values were chosen."""
    drawn = {}

    def objective(worker: Worker, trial: optuna.Trial) -> float:
        drawn[point_of(worker._frozen(trial))] = suggest(trial, worker._sweep.space[0])
        return 0.0

    monkeypatch.setattr(Worker, "_objective", objective)
    with StopRequest() as stop:
        worker = Worker(case.sweep, stop)
        study = worker._study
        study.tell(study.ask(), state=TrialState.FAIL)
        put_back_unfinished(study, retries=3)
        while waiting := worker._trials(TrialState.WAITING):
            worker._take(waiting[0])
    alone = optuna.create_study()
    for point in range(3):
        alone.sampler = make_sampler(case.sweep, point)
        assert drawn[point] == suggest(alone.ask(), case.sweep.space[0])


def test_a_study_belongs_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of two would each have a queue's lock of their own."""
    monkeypatch.chdir(Path(__file__).parents[2])
    cases = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        cases.append(make_case(tmp_path / name, SPACE.format(storage=f"storage: sqlite:///{tmp_path}/study.db")))
        cases[-1].sweep.folder.mkdir(parents=True)
    config = cases[0].sweep.sweep.config.read_bytes()
    cases[1].sweep.sweep.config.write_bytes(config)
    for _ in range(2):
        open_study(cases[0].sweep, FileLock(cases[0].sweep.folder / QUEUE_LOCK))
    with pytest.raises(UserError, match="belongs to a sweep in another folder") as error:
        open_study(cases[1].sweep, FileLock(cases[1].sweep.folder / QUEUE_LOCK))
    assert str(cases[1].sweep.folder) in (error.value.where or "")
    moved = cases[0].sweep.folder.rename(tmp_path / "case")
    moved.rename(cases[0].sweep.folder.parent / "case")
    open_study(cases[0].sweep, FileLock(cases[0].sweep.folder / QUEUE_LOCK))
