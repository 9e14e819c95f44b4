"""Workers of one sweep: every point once, whatever happens to a worker. The runs are stand-ins of a second each."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState
from sweep_case import LONGEST, SweepCase, make_case, wait_until

from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.results import read_results, to_markdown
from perl_megatron.sweep.storage import PREEMPTED, point_of
from perl_megatron.sweep.study import QUEUE_LOCK, open_study

pytestmark = pytest.mark.slow

GRID = """
  sampler: grid
  {storage}
workers: {{heartbeat: 1, grace: 3, stop_seconds: 20, retries: 2}}
space:
  optimizer.learning_rate: [1.0e-5, 1.0e-4, 1.0e-3]
"""


def states(case: SweepCase) -> Counter[str]:
    return Counter(trial.state.name for trial in case.study.get_trials())


@pytest.fixture
def grid(tmp_path: Path) -> SweepCase:
    return make_case(tmp_path, GRID.format(storage=""))


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_killed_workers_trial_is_resumed_and_none_is_run_twice(storage: str, tmp_path: Path) -> None:
    """SIGKILL in the middle of a run: its process is told to stop, and the other worker goes on from its checkpoint."""
    setting = f"storage: sqlite:///{tmp_path / 'study.db'}" if storage == "sqlite" else ""
    grid = make_case(tmp_path, GRID.format(storage=setting))
    grid.hold.touch()
    first = grid.start()
    wait_until(lambda: len(grid.steps(0)) == 2, first)
    second = grid.start()
    process = grid.steps(0)[0][1]
    first.kill()
    first.communicate()
    wait_until(lambda: not psutil.pid_exists(process), second)
    grid.hold.unlink()
    output, _ = second.communicate(timeout=LONGEST)
    assert second.returncode == 0, output
    assert "point-0000, seed-0: continues" in output
    trials = grid.study.get_trials()
    assert sorted(point_of(trial) for trial in trials if trial.state == TrialState.COMPLETE) == [0, 1, 2]
    assert states(grid) == {"COMPLETE": 3, "FAIL": 1}
    for point in range(3):
        assert [step for step, _ in grid.steps(point)] == [1, 2, 3, 4, 5, 6]
        assert len({process for _, process in grid.steps(point)}) == (2 if point == 0 else 1)
    assert {trial.params["optimizer.learning_rate"] for trial in trials} == {1e-5, 1e-4, 1e-3}


def test_an_interrupted_worker_gives_its_trial_back_at_once(grid: SweepCase) -> None:
    """SIGTERM, as before a preemption: the run writes a checkpoint, and the next worker has nothing to wait for."""
    grid.hold.touch()
    first = grid.start()
    wait_until(lambda: len(grid.steps(0)) == 2, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=LONGEST)
    assert first.returncode == 75, output
    assert "is in the queue again" in output
    assert states(grid) == {"FAIL": 1, "WAITING": 3}
    grid.hold.unlink()
    status, output = grid.work()
    assert status == 0, output
    assert states(grid) == {"COMPLETE": 3, "FAIL": 1}
    assert [step for step, _ in grid.steps(0)] == [1, 2, 3, 4, 5, 6]


def test_a_database_that_is_away_ends_the_worker_and_nothing_is_lost(tmp_path: Path) -> None:
    """It is overwritten in the middle of a run, and put back as it was."""
    database, copy = tmp_path / "study.db", tmp_path / "copy.db"
    grid = make_case(tmp_path, GRID.format(storage=f"storage: sqlite:///{database}"))
    grid.hold.touch()
    worker = grid.start()
    wait_until(lambda: len(grid.steps(0)) == 2, worker)
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    database.write_bytes(b"no database" * 10_000)
    grid.hold.unlink()
    output, _ = worker.communicate(timeout=LONGEST)
    assert worker.returncode == 2, output
    assert "Traceback" not in output
    assert "the study's storage failed: (sqlite3.DatabaseError) file is not a database" in output
    assert "sweep.storage" in output
    assert f"go on: perl-megatron sweep {grid.path}" in output
    copy.replace(database)
    status, output = grid.work()
    assert status == 0, output
    assert states(grid) == {"COMPLETE": 3, "FAIL": 1}
    assert [step for step, _ in grid.steps(0)] == [1, 2, 3, 4, 5, 6]


def test_a_worker_whose_run_was_told_to_stop_gives_its_trial_back_and_ends(grid: SweepCase) -> None:
    """As where Slurm preempts a job: it tells the steps, not the batch script. That is no failure of the point."""
    grid.hold.touch()
    first = grid.start()
    wait_until(lambda: len(grid.steps(0)) == 2, first)
    os.kill(grid.steps(0)[0][1], signal.SIGTERM)
    output, _ = first.communicate(timeout=LONGEST)
    assert first.returncode == 75, output
    assert "is in the queue again" in output
    assert states(grid) == {"FAIL": 1, "WAITING": 3}
    grid.hold.unlink()
    assert [trial.user_attrs.get(PREEMPTED) for trial in grid.study.get_trials()][:1] == [1]
    assert grid.work()[0] == 0
    assert [step for step, _ in grid.steps(0)] == [1, 2, 3, 4, 5, 6]


def test_a_worker_that_was_only_silent_gives_way(grid: SweepCase) -> None:
    """It is suspended for longer than the grace period, with its run at work; then both would run the same point."""
    grid.hold.touch()
    first = grid.start()
    wait_until(lambda: len(grid.steps(0)) == 2, first)
    first.send_signal(signal.SIGSTOP)
    grid.hold.unlink()  # its run goes on
    second = grid.start()
    wait_until(lambda: states(grid)["FAIL"] == 1, second)
    first.send_signal(signal.SIGCONT)
    outputs = [worker.communicate(timeout=LONGEST)[0] for worker in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "another worker" in outputs[0]
    assert states(grid) == {"COMPLETE": 3, "FAIL": 1}
    for point in range(3):
        assert [step for step, _ in grid.steps(point)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_a_worker_that_died_before_it_put_its_trial_back(grid: SweepCase) -> None:
    """What is done next follows from the study alone, whenever a worker is killed."""
    grid.sweep.folder.mkdir(parents=True)
    study = open_study(grid.sweep, FileLock(grid.sweep.folder / QUEUE_LOCK))
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()  # taken, and killed before the first heartbeat
    status, output = grid.work()
    assert status == 0, output
    assert states(grid) == {"COMPLETE": 3, "FAIL": 2}
    assert [len(grid.steps(point)) for point in range(3)] == [6, 6, 6]


def test_two_workers_share_the_points(tmp_path: Path) -> None:
    grid = make_case(tmp_path, GRID.format(storage="").replace("grace: 3", "grace: 60"))  # both are well
    workers = [grid.start(), grid.start()]
    for worker in workers:
        output, _ = worker.communicate(timeout=LONGEST)
        assert worker.returncode == 0, output
        assert ": done" in output
    assert states(grid) == {"COMPLETE": 3}
    assert [len(grid.steps(point)) for point in range(3)] == [6, 6, 6]


def test_a_run_that_crashes_is_resumed(grid: SweepCase) -> None:
    (grid.folder / "point-0001-crash").touch()
    status, output = grid.work()
    assert status == 0, output
    assert states(grid) == {"COMPLETE": 3, "FAIL": 1}
    assert [step for step, _ in grid.steps(1)] == [1, 2, 3, 4, 5, 6]
    attempts = {result.point: result.attempts for result in read_results(grid.sweep, grid.study)}
    assert attempts == {0: 1, 1: 2, 2: 1}


def test_points_that_are_refused_fail_for_good_and_the_others_go_on(tmp_path: Path) -> None:
    text = GRID.format(storage="") + "  algorithm.ratio: [token, sequence]\n"
    case = make_case(tmp_path, text.replace("[1.0e-5, 1.0e-4, 1.0e-3]", "[1.0e-4, 1.0e-3]"))
    status, output = case.work()
    assert status == 1, output
    assert output.count("failed for good") == 2
    assert "error: this point cannot be run" in output
    assert states(case) == {"COMPLETE": 2, "FAIL": 2}


def test_workers_end_where_too_many_points_fail(tmp_path: Path) -> None:
    text = GRID.format(storage="").replace("retries: 2", "max_failures: 1") + "  algorithm.ratio: [sequence]\n"
    case = make_case(tmp_path, text)
    status, output = case.work()
    assert status != 0
    assert "1 points of the sweep have failed" in output
    assert "error: this point cannot be run" in output
    assert states(case) == {"FAIL": 1, "WAITING": 2}


def test_asha_ends_the_worse_trials(tmp_path: Path) -> None:
    """Rates far from the best one have a lower curve from the first step on."""
    rates = ", ".join(f"1.0e-{exponent}" for exponent in (4, 5, 6, 7, 8, 9))
    case = make_case(
        tmp_path,
        f"""
  sampler: grid
  seeds: [0, 3]
  measures: reward/mean
workers: {{keep_weights: false}}
pruner: {{kind: asha, min_steps: 2, reduction_factor: 2}}
space:
  optimizer.learning_rate: [{rates}]
""",
    )
    (tmp_path / "slow").touch()
    status, output = case.work()
    assert status == 0, output
    results = read_results(case.sweep, case.study)
    assert results[0].state == "complete"
    assert results[0].params == {"optimizer.learning_rate": 1e-4}
    assert results[0].values["evaluation/accuracy"] == {"0": 1.0, "3": pytest.approx(1.03)}
    pruned = [result for result in results if result.state == "pruned"]
    assert len(pruned) >= 2
    for result in pruned:
        assert result.steps is not None
        assert not (case.sweep.folder / f"point-{result.point:04d}" / "seed-0" / "checkpoints").exists()
    # They ended soon after the decision, not after all steps. (A busy machine may be too slow to stop one in time.)
    assert min(len(case.steps(result.point)) for result in pruned) < 6
    interval = results[0].interval("reward/mean")
    assert interval is not None
    assert interval.mean == pytest.approx(2.03)
    assert "| 2.0300 ± 0.3812 |" in to_markdown(case.sweep, results)


def test_random_points_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    text = """
  sampler: random
  trials: 4
space:
  optimizer.learning_rate: {low: 1.0e-6, high: 1.0e-2, log: true}
  rollout.num_rollouts: {low: 2, high: 64}
"""
    drawn = []
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        case = make_case(tmp_path / name, text)
        for worker in [case.start() for _ in range(count)]:
            output, _ = worker.communicate(timeout=LONGEST)
            assert worker.returncode == 0, output
        drawn.append({trial.number: trial.params for trial in case.study.get_trials()})
        assert states(case) == {"COMPLETE": 4}
    assert drawn[0] == drawn[1]
    assert len({params["optimizer.learning_rate"] for params in drawn[0].values()}) == 4
