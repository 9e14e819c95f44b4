"""Reading recorded rollouts, choosing among them, and what is said where they are not as they should be."""

import json

import numpy as np
import pytest
from recorded_run import RecordedRun

from perl_megatron.errors import UserError
from perl_megatron.triage.command import triage
from perl_megatron.triage.dump import newest_usable, open_dump, read_rollouts, spread


def look(path, **options):
    return triage(path, **{"policy": None, "other_policies": (), "limit": 16} | options)


@pytest.fixture
def run(first_step, tmp_path) -> RecordedRun:
    return first_step.copy(tmp_path / "run")


def test_a_run_its_rollouts_and_a_file_are_the_same(run, monkeypatch):
    dumps = [open_dump(path) for path in (run.root, run.root / "rollouts", run.file)]
    assert {dump.files for dump in dumps} == {(run.file,)}
    assert {dump.images for dump in dumps} == {run.root / "rollouts" / "images"}
    assert all(dump.config.model.path == run.policy for dump in dumps)
    monkeypatch.chdir(run.file.parent)
    assert open_dump(run.file.relative_to(run.file.parent)).run.root == run.root


def test_a_row_comes_back(run):
    row, rollout = run.rows[2], read_rollouts(run.file)[2]
    assert (rollout.record, rollout.view, list(rollout.order)) == ("two", 1, [1, 0])
    assert rollout.permuted
    assert list(rollout.image_keys) == row["images"]
    assert rollout.prompt_ids.tolist() == row["prompt_token_ids"]
    assert rollout.response_ids.tolist() == row["response_token_ids"]
    assert rollout.logprob_rollout.tolist() == np.float32(row["logprob_rollout"]).tolist()
    assert rollout.logprob_rollout.dtype == np.float64
    assert rollout.weight_version == 0


def test_no_such_run(run, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        look(tmp_path / "absent")
    (run.root / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        look(run.file)


def test_nothing_recorded(run):
    run.file.write_text("")
    with pytest.raises(UserError, match="holds no rollouts"):
        look(run.root)
    run.file.unlink()
    with pytest.raises(UserError, match=r"has recorded no rollouts(.|\n)*record_rollouts=true"):
        look(run.root)


@pytest.mark.parametrize("field", ["prompt_token_ids", "response_token_ids", "logprob_rollout", "logprob_old"])
def test_an_older_dump(run, field):
    rows = run.rows
    for row in rows:
        del row[field]
    run.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"without {field}(.|\n)*record again"):
        look(run.root)


def test_numbers_that_do_not_fit_the_tokens(run):
    run.rewrite(lambda row: {"logprob_old": row["logprob_old"][1:]})
    with pytest.raises(UserError, match="logprob_old has 8 numbers for 9 response tokens"):
        look(run.root)


def test_images_that_were_not_recorded(run):
    for image in (run.root / "rollouts" / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="was not recorded"):
        look(run.root)


def test_a_trainer_that_computed_nothing_is_not_judged(run):
    report = look(run.rewrite(lambda row: {"logprob_old": None}).root)
    assert [each.party for each in report.verdicts] == ["engine"]
    assert "no log-probabilities of it were recorded" in report.not_judged[0]
    assert report.direct is None
    assert report.agrees


def test_the_limit_spreads_over_images_views_and_records(run):
    rollouts = read_rollouts(run.file)
    chosen = spread(rollouts, 5)
    kinds = {(len(each.image_keys), each.permuted) for each in rollouts}
    assert len(kinds) == 5
    assert {(len(each.image_keys), each.permuted) for each in chosen} == kinds
    assert sorted(each.name for each in spread(rollouts, 100)) == sorted(each.name for each in rollouts)
    assert look(run.root, limit=3).num_rollouts == 3


def test_rollouts_with_both_parties_come_first(run):
    run.rewrite(lambda row: {"logprob_old": None} if row["record"] == "two" else {})
    chosen = spread(read_rollouts(run.file), 8)
    assert [each.logprob_old is None for each in chosen] == [False] * 6 + [True] * 2
    assert [each.permuted for each in chosen[-2:]] == [False, True]
    report = look(run.root)
    assert [each.num_rollouts for each in report.verdicts] == [10, 6]


def test_a_response_without_tokens_is_passed_over(run):
    rows = run.rows
    rows[0] |= {"response_token_ids": [], "logprob_rollout": [], "logprob_old": []}
    run.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_rollouts(run.file)) == len(rows) - 1


def test_the_newest_step_whose_weights_are_there(run):
    later = run.file.with_name("step-000002.jsonl")
    later.write_text("".join(json.dumps(row | {"step": 2, "weight_versions": [[1, 0, 9]]}) + "\n" for row in run.rows))
    report = look(run.root)
    assert report.source.startswith("step 1, weights of version 0")
    assert {each.step for each in newest_usable(open_dump(run.root), lambda rollout: True)} == {2}
    with pytest.raises(UserError, match=r"no longer there(.|\n)*there are versions 0(.|\n)*--policy FOLDER"):
        look(later)
    with pytest.raises(UserError, match="of versions 0, 1, which are not all of one policy"):
        look(run.root, policy=run.policy)
    assert look(later, policy=run.policy).agrees


def test_weights_that_changed_in_the_middle_of_a_response(run, policies):
    """No policy has sampled such a response, so it is left out; not even --policy helps."""
    whole = run.rows[0]["weight_versions"]
    assert whole == [[0, 0, 9]]
    run.rewrite(lambda row: {"weight_versions": [[0, 0, 4], [1, 4, 9]]} if row["record"] == "two" else {})
    assert [rollout.weight_version for rollout in read_rollouts(run.file)] == [None] * 4 + [0] * 6
    assert look(run.root).num_rollouts == look(run.root, policy=run.policy).num_rollouts == 6
    run.rewrite(lambda row: {"weight_versions": [[0, 0, 4], [1, 4, 9]]})
    for policy in (None, run.policy):
        with pytest.raises(UserError, match="changed in the middle of each response"):
            look(run.root, policy=policy)


def test_weights_of_another_version_than_the_engines(run, policies):
    """An engine that runs behind: its version is not the one before the step."""
    run.rewrite(lambda row: {"step": 3})
    report = look(run.root)
    assert [each.party for each in report.verdicts] == ["engine"]
    assert report.not_judged == ("trainer: its weights, version 2, are no longer there",)
