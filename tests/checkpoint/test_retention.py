import json

import pytest

from perl_megatron.checkpoint.manifest import PendingCheckpoint, latest_checkpoint
from perl_megatron.checkpoint.retention import MANIFEST, Retention, delete_checkpoint, list_checkpoints
from perl_megatron.errors import UserError


def write(directory, step, retention):
    pending = PendingCheckpoint.begin(directory, step)
    pending.write("a.txt", f"weights of step {step}")
    return pending.commit(retention)


def steps(directory):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]


def scored(value, **options):
    return Retention(**{"keep": 2, "run": "ours", "metric": "evaluation/accuracy", "value": value, **options})


@pytest.mark.parametrize(("highest", "kept"), [(True, [2, 5, 6]), (False, [4, 5, 6])])
def test_the_best_is_kept_beside_the_newest(tmp_path, highest, kept):
    for step, value in enumerate((0.3, 0.9, 0.5, 0.1, 0.8, None), start=1):
        write(tmp_path, step, scored(value, highest=highest))
    assert steps(tmp_path) == kept


def test_of_equally_good_ones_the_latest_is_kept(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, scored(0.5 if step < 4 else 0.1, keep=1))
    assert steps(tmp_path) == [3, 5]


def test_values_that_are_not_numbers_and_other_metrics_do_not_count(tmp_path):
    write(tmp_path, 1, scored(float("nan"), keep=1))
    write(tmp_path, 2, scored(9.0, keep=1, metric="loss"))
    write(tmp_path, 3, scored(0.1, keep=1))
    write(tmp_path, 4, scored(None, keep=1))
    assert steps(tmp_path) == [3, 4]


def test_without_a_metric_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, scored(1.0 / step, keep=1, metric=None))
    assert steps(tmp_path) == [3]


def test_another_runs_checkpoints_are_never_deleted_and_do_not_count(tmp_path):
    write(tmp_path, 1, Retention(run="theirs"))
    write(tmp_path, 90, Retention(run="theirs"))
    for step in (2, 3, 4):
        write(tmp_path, step, Retention(keep=2, run="ours"))
    assert steps(tmp_path) == [1, 3, 4, 90]


def test_a_step_of_another_run_is_put_aside(tmp_path):
    write(tmp_path, 1, Retention(run="theirs"))
    write(tmp_path, 1, Retention(run="ours"))
    assert json.loads((tmp_path / "step-00000001" / MANIFEST).read_text())["run"] == "ours"
    assert json.loads((tmp_path / "other-run-step-00000001" / MANIFEST).read_text())["run"] == "theirs"


def test_one_whose_manifest_cannot_be_read_may_be_another_runs_and_stays(tmp_path):
    write(tmp_path, 1, Retention(run="theirs"))
    (tmp_path / "step-00000001" / MANIFEST).write_text("{")
    for step in (2, 3, 4):
        write(tmp_path, step, Retention(keep=2, run="ours"))
    assert steps(tmp_path) == [1, 3, 4]


def test_whatever_was_put_aside_before_stays(tmp_path):
    for run in ("theirs", "ours", "theirs", "ours", "theirs", "ours"):
        write(tmp_path, 1, Retention(run=run))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "other-run-step-00000001",
        *(f"other-run-step-00000001.{n}" for n in (2, 3, 4, 5)),
        "step-00000001",
    ]


def test_damaged_ones_of_later_steps_do_not_push_out_good_ones(tmp_path):
    """The run went on from step 2, as step 9 was damaged; keeping one must not keep that one alone."""
    write(tmp_path, 2, Retention(keep=1, run="ours"))
    write(tmp_path, 9, Retention(keep=2, run="ours"))
    (tmp_path / "step-00000009" / "a.txt").unlink()
    write(tmp_path, 3, Retention(keep=1, run="ours"))
    assert steps(tmp_path) == [3, 9]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"


def test_what_is_refused_is_passed_over_by_name(tmp_path, caplog):
    for step in (1, 2):
        write(tmp_path, step, Retention())

    def refuse(checkpoint):
        if checkpoint.name.endswith("2"):
            raise UserError("it belongs to another run", where=str(checkpoint))

    assert latest_checkpoint(tmp_path, refuse=refuse) == tmp_path / "step-00000001"
    assert "another run" in caplog.text
    assert "step-00000002" in caplog.text


def test_half_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1, Retention())

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: ignore_errors or killed(path))
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(tmp_path / "step-00000001")
    monkeypatch.undo()
    assert steps(tmp_path) == []
    write(tmp_path, 2, Retention())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_late_scores_change_what_is_kept_and_nothing_else(tmp_path):
    for step in range(1, 4):
        write(tmp_path, step, scored({1: 0.3}.get(step), keep=2))
    write(tmp_path, 9, Retention(run="theirs"))
    assert steps(tmp_path) == [1, 2, 3, 9]
    values = {1: 0.3, 2: 0.7, 3: float("inf"), 9: 1.0}
    scored(None, keep=1).score_late(tmp_path / "step-00000003", values.get)
    assert steps(tmp_path) == [2, 3, 9]
    facts = json.loads((tmp_path / "step-00000002" / MANIFEST).read_text())
    assert facts["score"] == {"metric": "evaluation/accuracy", "value": 0.7}
    assert latest_checkpoint(tmp_path, refuse=refuse_others) == tmp_path / "step-00000003"
    assert latest_checkpoint(tmp_path / "none") is None


def refuse_others(checkpoint):
    if json.loads((checkpoint / MANIFEST).read_text())["run"] != "ours":
        raise UserError("it belongs to another run", where=str(checkpoint))


def test_a_score_for_a_damaged_manifest_is_left_out(tmp_path):
    write(tmp_path, 1, scored(None))
    (tmp_path / "step-00000001" / MANIFEST).write_text('{"run": "ours"')
    scored(None).score_late(tmp_path / "step-00000001", {1: 0.5}.get)
    assert (tmp_path / "step-00000001" / MANIFEST).read_text() == '{"run": "ours"'
