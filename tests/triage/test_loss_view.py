"""Triage of a run whose loss is conditioned on the original's prompt (algorithm.loss_view)."""

import pytest

from perl_megatron.triage.command import triage


@pytest.mark.parametrize("loss_view", ["own", "original"])
def test_the_trainers_numbers_of_another_prompt_are_not_held_against_it(first_step, tmp_path, loss_view):
    run = first_step.copy(tmp_path / "run")

    def of_another_prompt(row):
        return {"logprob_old": [value - 1 for value in row["logprob_old"]]} if row["view"] else {}

    run.rewrite(of_another_prompt)
    config = run.root / "config.yaml"
    text = config.read_text()
    assert 'loss_view: "own"' in text
    config.write_text(text.replace('loss_view: "own"', f'loss_view: "{loss_view}"'))
    report = triage(run.root, policy=None, other_policies=(), limit=16)
    assert report.agrees is (loss_view == "original")
    assert report.direct is not None
    assert (report.direct[0] < 0.5) is (loss_view == "original")
