"""One step of published methods and of the ablation, with a user's command."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from small_job import REPOSITORY, SMALL, SmallJob
from test_training import steps

ONE_STEP = (*SMALL, "run.steps=1", "rollout.engine=embedded", "data.evaluation=null", "parallel.tensor=1")


def rollouts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]


def test_an_arm_of_the_ablation(job: SmallJob) -> None:
    """The release's orders: two images trade places, of three the first two, in every group the same."""
    arms = yaml.safe_load((REPOSITORY / "examples" / "ablation" / "sweep.yaml").read_text())["arms"]
    place = ("run.name=released", f"run.directory={job.work / 'runs'}", "run.record_rollouts=true")
    settings = (*place, *ONE_STEP, "filter.max_refills=0")  # as the study has it
    result = job.run_warm("train", "../ablation/ablation.yaml", *arms["n_s = 1, released orders"], *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    run = job.work / "runs" / "released"
    orders = {tuple(row["order"]) for row in rollouts(run) if row["view"] == 1}
    assert orders <= {(1, 0), (1, 0, 2)}
    assert len(orders) == 2
    assert steps(run)[0]["groups/refills"] == 0


def test_a_preset_with_everything_that_can_be_asked_of_a_group(job: SmallJob) -> None:
    """Two levels, leave-one-out, the KL and two parts of a group's own in the reward, questions about the order."""
    result = job.run_warm(
        *("train", "train.yaml", "preset=[paper, dapo]", "run.name=everything", *ONE_STEP),
        *("filter.no_signal=false", "filter.oversample=1.5", "algorithm.advantage_level=two_level"),
        *("algorithm.baseline=leave_one_out", "algorithm.kl_in=reward", "algorithm.kl_coefficient=0.05"),
        *("reward.consistency=0.2", "reward.overlong=0.1", "reward.overlong_buffer=4", "permutation.recover_order=0.5"),
        *("algorithm.updates_per_step=2", "data.max_prompt_tokens=400"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = job.work / "runs" / "everything"
    (logged,) = steps(run)
    assert logged["reward/kl_penalty"] == 0  # the policy is still the reference
    assert -1 <= logged["reward/part/overlong"] <= 0
    assert logged["kl"] == 0
    rows = rollouts(run)
    assert {"recover_order"} < {row["kind"] for row in rows}
    assert {len(row["reward_parts"]) for row in rows} == {4}
    ledger = [json.loads(line) for line in (run / "groups.jsonl").read_text().splitlines()]
    assert [row["decision"] for row in ledger].count("kept") == 4
    assert {row["reason"] for row in ledger if row["decision"] == "dropped"} <= {
        *("surplus", "over_long", "accuracy_low", "accuracy_high")  # DAPO keeps groups with right and wrong answers
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["algorithm"]["clip_high"] == 0.28  # DAPO's, above the paper's
    assert "# preset dapo" in (run / "config.yaml").read_text()
