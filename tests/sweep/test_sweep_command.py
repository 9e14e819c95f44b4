"""What `perl-megatron sweep` checks, prints and writes. Trials are put into the study by hand: nothing is trained."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sweep_case import SweepCase, make_case

from perl_megatron import cli
from perl_megatron.errors import UserError
from perl_megatron.sweep import check
from perl_megatron.sweep.check import check_sweep, measures, num_processes
from perl_megatron.sweep.command import SweepOptions, write_results
from perl_megatron.sweep.command import run as run_command
from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.storage import REFUSED
from perl_megatron.sweep.study import Asha, make_sampler, open_study, suggest
from perl_megatron.sweep.worker import VALUES

SPACE = """
  sampler: random
  trials: 3
  seeds: [0, 1]
  measures: evaluation/flip_rate
space:
  optimizer.learning_rate: {low: 1.0e-6, high: 1.0e-2, log: true}
  algorithm.ratio: [token, sequence_mean]
"""


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepCase:
    monkeypatch.chdir(Path(__file__).parents[2])
    return make_case(tmp_path, SPACE)


def fill(case: SweepCase) -> optuna.Study:
    """Two complete points and one that failed, of a study that a worker has opened."""
    case.sweep.folder.mkdir(parents=True)
    study = open_study(case.sweep, FileLock(case.sweep.folder / "queue.lock"))
    for number, accuracies in enumerate([{"0": 0.5, "1": 0.7}, {"0": 0.6, "1": 0.8}]):
        trial = study.ask()
        trial.suggest_float("optimizer.learning_rate", 1e-6, 1e-2, log=True)
        trial.suggest_categorical("algorithm.ratio", ["token", "sequence_mean"])
        for step in range(3):
            trial.report(step / 3 + number / 10, step)
        trial.set_user_attr(VALUES, {"evaluation/accuracy": accuracies, "evaluation/flip_rate": {"0": 0.25, "1": None}})
        study.tell(trial, sum(accuracies.values()) / 2)
    trial = study.ask()
    trial.set_user_attr(REFUSED, True)
    study.tell(trial, state=TrialState.FAIL)
    return study


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_the_results_are_a_table_and_plots(case: SweepCase, capsys: pytest.CaptureFixture[str]) -> None:
    study = fill(case)
    write_results(case.sweep, study)
    folder = case.sweep.folder
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["state"] for row in rows] == ["complete", "complete", "failed"]
    assert [row["point"] for row in rows] == ["1", "0", "2"]  # the best first
    assert float(rows[0]["evaluation/accuracy"]) == pytest.approx(0.7)
    assert float(rows[1]["evaluation/accuracy difference"]) == pytest.approx(-0.1)
    assert float(rows[1]["evaluation/accuracy difference ±"]) == pytest.approx(0, abs=1e-9)
    assert rows[1]["evaluation/flip_rate ±"] == ""
    content = json.loads((folder / "results.json").read_text())
    assert content["points"][0]["values"]["evaluation/accuracy"] == {"0": 0.6, "1": 0.8}
    printed = capsys.readouterr().out
    assert "| 0.7000 ± 1.2706 |" in printed
    assert f"optuna-dashboard {folder / 'study.journal'}" in printed
    for name in ("points.png", "history.png", "curves.png"):
        assert (folder / name).stat().st_size > 2000, name


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_other_settings_are_not_mixed_into_a_sweep(case: SweepCase) -> None:
    fill(case)
    text = case.path.read_text()
    case.path.write_text(text.replace("trials: 3", "trials: 5"))
    queue = FileLock(case.sweep.folder / "queue.lock")
    study = open_study(case.sweep, queue)  # more points are welcome
    assert [trial.state for trial in study.get_trials()].count(TrialState.WAITING) == 2
    for old, new in (("high: 1.0e-2", "high: 1.0e-3"), ("seeds: [0, 1]", "seeds: [0, 2]")):
        case.path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="began with other settings"):
            open_study(case.sweep, queue)
    case.path.write_text(text)
    config = case.folder / "config.yaml"
    config.write_text(config.read_text() + "optimizer: {beta1: 0.5}\n")
    with pytest.raises(UserError, match=r"config: optimizer.beta1: '0.9' -> '0.5'"):
        open_study(case.sweep, queue)


def test_every_value_is_checked_before_anything_starts(case: SweepCase) -> None:
    text = case.path.read_text()
    check_sweep(case.sweep)
    for old, new, what, where in (
        ("[token, sequence_mean]", "[token, sequense]", "algorithm.ratio = 'sequense'", "sweep.yaml:12"),
        (
            "low: 1.0e-6, high: 1.0e-2, log: true",
            "low: -1.0, high: 1.0",
            "optimizer.learning_rate = -1.0",
            "sweep.yaml:11",
        ),
        ("seeds:", "overrides: [algorithm.aggregation=token]\n  seeds:", "'sequence_mean'", "algorithm.aggregation"),
        ("seeds:", "metric: evaluation/acuracy\n  seeds:", "'evaluation/acuracy' is no metric", "sweep.metric"),
        ("seeds:", "metric: reward/mean:mid\n  seeds:", "'mid' is no reduction", "sweep.metric"),
    ):
        case.path.write_text(text.replace(old, new))
        with pytest.raises(UserError) as error:
            check_sweep(case.sweep)
        assert what in str(error.value)
        assert where in str(error.value), str(error.value)
    case.path.write_text(text)
    (case.folder / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"data.jsonl does not exist"):
        check_sweep(case.sweep)
    assert not case.sweep.folder.exists()


GRID = """
  sampler: grid
space:
  parallel.tensor: [2, 1]
  optimizer.learning_rate: {low: 1.0e-6, high: 1.0e-3, points: 210}
  parallel.sequence: [false, true]
"""


def test_all_points_of_a_grid_are_checked(
    tmp_path: Path, case: SweepCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The illegal ones of these 840 come last."""
    case = make_case(tmp_path, GRID)
    for most in (5000, 100, 3):  # whole; with three learning rates; three points of those
        monkeypatch.setattr(check, "MAX_CHECKED_POINTS", most)
        with pytest.raises(UserError, match=r"no run can start at .*sequence parallelism needs"):
            check_sweep(case.sweep)
    case = make_case(tmp_path, GRID.replace("tensor: [2, 1]", "tensor: [1, 2]").replace("[false, true]", "[false]"))
    for most, said in ((5000, ""), (100, "6 of 420 points were checked"), (3, "3 of 420 points were checked")):
        monkeypatch.setattr(check, "MAX_CHECKED_POINTS", most)
        assert check_sweep(case.sweep) == said
        assert num_processes(case.sweep) == 2
    assert cli.main(["sweep", str(case.path), "--dry-run"]) == 0
    assert "3 of 420 points were checked" in capsys.readouterr().out


def test_a_dry_run_says_what_would_run(case: SweepCase, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", str(case.path), "--dry-run", "sweep.trials=7"]) == 0
    printed = capsys.readouterr().out
    assert "7 points with seeds 0, 1: random" in printed
    assert "optimizer.learning_rate: 1e-06 … 0.01 (log)" in printed
    assert f"run.directory={case.folder}/sweeps/case/point-0000" in printed
    assert cli.main(["sweep", str(case.path), "--dry-run", "--slurm", "5", "slurm.options=[--time=1:00:00]"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-4" in script
    assert "#SBATCH --time=1:00:00" in script
    assert f"perl_megatron sweep {case.path} --worker 'slurm.options=[--time=1:00:00]' &" in script
    with pytest.raises(UserError, match="the password would be written into the job's script") as error:
        run_command(SweepOptions(case.path, ("sweep.storage=mysql://me:secret@host/x",), slurm=2, dry_run=True))
    assert "secret" not in str(error.value)
    assert not case.sweep.folder.exists()


def test_the_workers_of_slurm_have_the_machines_of_their_runs(
    case: SweepCase, capsys: pytest.CaptureFixture[str]
) -> None:
    text = case.path.read_text()
    dry_run = ["sweep", str(case.path), "--dry-run", "--slurm", "2"]
    for nodes, printed in (("parallel.data=4, launch.nodes=2", "--nodes=2 "), ("parallel.data=4", "--nodes=1 ")):
        case.path.write_text(text.replace("seeds:", f"overrides: [{nodes}]\n  seeds:"))
        assert cli.main(dry_run) == 0
        assert f"#SBATCH {printed}" in capsys.readouterr().out
    # A sweep over it: the array has the most that a run needs.
    case.path.write_text(
        text.replace("seeds:", "overrides: [parallel.data=4]\n  seeds:") + "  launch.nodes: [1, 4, 2]\n"
    )
    assert cli.main(dry_run) == 0
    assert "#SBATCH --nodes=4 " in capsys.readouterr().out
    for overrides, said in (
        ("launch.rollout_nodes=1", "a trial has no machines for rollout servers"),
        ("parallel.data=3, launch.nodes=2", "3 processes (data 3"),
    ):
        case.path.write_text(text.replace("seeds:", f"overrides: [{overrides}]\n  seeds:"))
        assert cli.main(dry_run) == 2
        assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_failed_points_are_begun_again_on_request(case: SweepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(case)
    assert run_command(SweepOptions(case.path, ())) == 1  # nothing is left to do, and one point has failed
    monkeypatch.setattr("perl_megatron.sweep.command.run_workers", lambda *_, **__: [75])
    assert run_command(SweepOptions(case.path, (), retry_failed=True)) == 75
    last = case.study.get_trials()[-1]
    assert (last.state, last.number, last.system_attrs["failed_trial"]) == (TrialState.WAITING, 3, 2)


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_failed_points_are_begun_again_by_slurms_workers(
    case: SweepCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(case)
    monkeypatch.setattr("perl_megatron.sweep.command.submit", lambda _: 12)
    assert run_command(SweepOptions(case.path, (), slurm=2, retry_failed=True)) == 0
    assert f"job array 12: {case.sweep.folder}/worker-N.log" in capsys.readouterr().out
    assert case.study.get_trials()[-1].state == TrialState.WAITING
    for options in (
        SweepOptions(case.path, (), worker=True, retry_failed=True),
        SweepOptions(case.path, (), results=True, retry_failed=True),
    ):
        with pytest.raises(UserError, match="nothing would be begun again"):
            run_command(options)


def test_a_new_study_does_not_take_the_runs_of_an_old_one(case: SweepCase) -> None:
    (case.sweep.folder / "point-0000" / "seed-0").mkdir(parents=True)
    for _ in range(2):  # what the first attempt has made does not hide them from the second
        with pytest.raises(UserError, match="holds the runs of another one"):
            open_study(case.sweep, FileLock(case.sweep.folder / "queue.lock"))


def test_asha_does_not_count_interruptions() -> None:
    """The best of three goes on, though a point that was better was interrupted three times."""
    pruner = Asha(min_resource=1, reduction_factor=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    rungs = [(0.1, TrialState.COMPLETE), (0.2, TrialState.COMPLETE), *[(0.9, TrialState.FAIL)] * 3]
    for value, state in rungs:
        attributes = {"completed_rung_0": value}
        ended = None if state == TrialState.FAIL else value
        study.add_trial(optuna.create_trial(state=state, value=ended, system_attrs=attributes))
    trial = study.ask()
    trial.report(0.5, 1)
    assert not trial.should_prune()


def test_a_measure_is_one_number_of_a_run(case: SweepCase) -> None:
    rows = [{"step": 0, "evaluation/accuracy": 0.5}, {"step": 1}, {"step": 2, "evaluation/accuracy": 0.25}]
    text = case.path.read_text()
    for name, value in (("", 0.25), (":first", 0.5), (":max", 0.5), (":mean", 0.375), (":sum", 0.75)):
        case.path.write_text(text.replace("seeds:", f"metric: evaluation/accuracy{name}\n  seeds:"))
        assert measures(case.sweep)[0].of(rows) == value
    assert measures(case.sweep)[0].of([{"step": 0, "evaluation/accuracy": None}]) is None


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_tpe_looks_where_values_are_good(case: SweepCase) -> None:
    """The first ten points are random ones; others know them."""
    case.path.write_text(
        case.path.read_text().replace("sampler: random", "sampler: tpe").replace("trials: 3", "trials: 30")
    )
    sweep = case.sweep
    sweep.folder.mkdir(parents=True)
    study = open_study(sweep, FileLock(sweep.folder / "queue.lock"))
    distances = []
    for number in range(sweep.num_trials):
        study.sampler = make_sampler(sweep, number)
        trial = study.ask()
        assert trial.number == number
        rate = suggest(trial, sweep.space[0])
        assert isinstance(rate, float)
        distances.append(abs(math.log10(rate) + 4))
        study.tell(trial, -distances[-1])
    assert len(set(distances)) == 30
    assert statistics.fmean(distances[20:]) < statistics.fmean(distances[:10]) / 2


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_the_study_is_one_that_other_tools_read(case: SweepCase) -> None:
    """A plain journal file. (What was tried with optuna-dashboard itself is in docs/sweep.md.)"""
    fill(case)
    storage = JournalStorage(JournalFileBackend(str(case.sweep.folder / "study.journal")))
    study = optuna.load_study(study_name="case", storage=storage)
    assert study.best_trial.user_attrs[VALUES]["evaluation/accuracy"] == {"0": 0.6, "1": 0.8}
