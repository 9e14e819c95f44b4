"""What is found wrong with the records themselves."""

import json

import numpy as np
import pytest
from PIL import Image
from recorded_run import RecordedRun

from perl_megatron.triage import cases
from perl_megatron.triage.command import triage
from perl_megatron.triage.verdicts import Cause


def look(run: RecordedRun):
    return triage(run.root, policy=None, other_policies=(), limit=16)


@pytest.fixture
def run(first_step, tmp_path) -> RecordedRun:
    return first_step.copy(tmp_path / "run")


def test_a_changed_image(run):
    """Its rollouts cannot be judged; the others can."""
    path = run.root / "rollouts" / "images" / f"{run.rows[0]['images'][0]}.png"
    image = np.array(Image.open(path))
    image[0, 0] ^= 1
    Image.fromarray(image).save(path)
    report = look(run)
    assert [finding.cause for finding in report.findings] == [Cause.PIXELS]
    assert path.name in report.findings[0].text
    assert {each.num_rollouts for each in report.verdicts} == {6}
    assert not any(each.causes for each in report.verdicts)
    assert not report.agrees
    assert "record: pixels." in report.render()


def test_all_images_changed(run):
    for path in (run.root / "rollouts" / "images").iterdir():
        image = Image.open(path)
        Image.new("RGB", image.size).save(path)
    rows = [row for row in run.rows if row["images"]]
    run.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = look(run)
    assert report.verdicts == ()
    assert not report.agrees
    assert report.not_judged == ("engine and trainer: the images of all rollouts were changed",)


def test_another_prompt_than_the_processor_makes_now(run):
    """Both parties agree with the recorded ids; that these are others than now is said, with the place."""
    config = (run.root / "config.yaml").read_text()
    (run.root / "config.yaml").write_text(config.replace('system_prompt: "Think."', 'system_prompt: "Think twice."'))
    report = look(run)
    assert {finding.cause for finding in report.findings} == {Cause.TOKEN_IDS}
    assert len(report.findings) == 10
    assert "recorded …'<|im_start|>system\\nThink" in report.findings[0].text
    assert "twice" in report.findings[0].text.split("now …")[1]
    assert not any(each.causes for each in report.verdicts)
    assert not report.agrees


def test_image_tokens_that_do_not_fit_the_images(run):
    """Nothing can be computed on such ids: the processor's are taken, and the finding stays."""
    pad = run.encoder.image_token_id

    def one_less(row):
        ids = row["prompt_token_ids"]
        return {"prompt_token_ids": ids[: ids.index(pad)] + ids[ids.index(pad) + 1 :]} if pad in ids else {}

    report = look(run.rewrite(one_less))
    assert [finding.cause for finding in report.findings] == [Cause.TOKEN_IDS] * 8
    assert not any(each.causes for each in report.verdicts)


def test_a_response_of_other_tokens(run):
    report = look(run.rewrite(lambda row: {"response": row["response"] + "?"} if row["record"] == "none" else {}))
    assert [finding.cause for finding in report.findings] == [Cause.TOKEN_IDS] * 2
    assert "do not spell the recorded response" in report.findings[0].text


def test_the_trainers_positions_are_compared_with_transformers(run, monkeypatch):
    real = cases.position_ids
    monkeypatch.setattr(cases, "position_ids", lambda prompt, length: real(prompt, length) + 1)
    report = look(run)
    assert [finding.cause for finding in report.findings] == [Cause.POSITIONS] * 10
    assert "mrope.py" in report.findings[0].text
