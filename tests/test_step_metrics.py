"""How far the engine is from the trainer, by view and number of images: two records worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.drawn import EXPIRED, Drawn, DrawnQuestion
from perl_megatron.observability.metrics import check_names
from perl_megatron.step_metrics import mismatch_metrics, rollout_metrics
from perl_megatron.types import Group, Record, Rollout, View

# log(π_old / π_rollout) of each token of each response.
TWO_IMAGES = {False: [[0.0, 0.2], [-0.1]], True: [[1.0, -0.4, 0.0]]}
THREE_IMAGES = {False: [[0.3]], True: [[-1.2, 0.1]]}


def group_of(num_images: int, log_ratios: dict[bool, list[list[float]]]) -> Group:
    """A group with one original and one permuted view (responses by `permuted`)."""
    images = tuple(Path(f"{slot}.png") for slot in range(num_images))
    record = Record(f"{num_images} images", images, "?", "7")
    orders = tuple(range(num_images)), tuple(reversed(range(num_images)))
    views = tuple(View(record.id, i, order, images, "?", "7", "number") for i, order in enumerate(orders))
    rollouts = []
    for view in views:
        for difference in log_ratios[view.permuted]:
            sampled = np.linspace(-1, -2, len(difference))
            rollout = Rollout(
                view.index, np.arange(len(difference)), sampled, "stop", "", np.zeros(len(difference), np.int64)
            )
            rollout.logprob_old = sampled + difference
            rollouts.append(rollout)
    return Group(record, views, (), rollouts)


@pytest.fixture
def groups() -> list[Group]:
    return [group_of(2, TWO_IMAGES), group_of(3, THREE_IMAGES)]


PARTS = {
    "": [0.0, 0.2, -0.1, 1.0, -0.4, 0.0, 0.3, -1.2, 0.1],
    "_original": [0.0, 0.2, -0.1, 0.3],
    "_permuted": [1.0, -0.4, 0.0, -1.2, 0.1],
    "_2_images": [0.0, 0.2, -0.1, 1.0, -0.4, 0.0],
    "_3_images": [0.3, -1.2, 0.1],
}


def test_gap_and_divergence_of_all_tokens_and_of_each_part(groups: list[Group]) -> None:
    metrics = mismatch_metrics(groups, AlgorithmConfig())
    check_names(metrics)
    assert len(metrics) == 4 * len(PARTS)
    for suffix, values in PARTS.items():
        assert metrics["logprob_gap/mean" + suffix] == pytest.approx(np.mean(np.abs(values)))
        assert metrics["logprob_gap/max" + suffix] == pytest.approx(np.max(np.abs(values)))
        assert metrics["logprob_gap/kl_k1" + suffix] == pytest.approx(-np.mean(values))
        expected = np.mean([math.exp(value) - 1 - value for value in values])
        assert metrics["logprob_gap/kl_k3" + suffix] == pytest.approx(expected)


def weighted(groups: list[Group], *weights: list[float]) -> list[Group]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout, values in zip(rollouts, weights, strict=True):
        assert rollout.logprob_old is not None
        ratio = np.exp(rollout.logprob_old - rollout.logprob_rollout)
        rollout.importance = np.array([r if v is None else v for r, v in zip(ratio, values, strict=True)])
    return groups


def test_share_of_tokens_that_met_a_bound(groups: list[Group]) -> None:
    """Bounds 0.5 and 2 meet the tokens e^1.0 and e^-1.2, both of permuted views."""
    groups = weighted(groups, [None, None], [None], [0, None, None], [None], [0, None])
    metrics = mismatch_metrics(groups, AlgorithmConfig(importance_correction="masked"))
    check_names(metrics)
    shares = {"": 2 / 9, "_original": 0, "_permuted": 2 / 5, "_2_images": 1 / 6, "_3_images": 1 / 3}
    for suffix, share in shares.items():
        kept = [math.exp(value) for value in PARTS[suffix] if abs(value) < 0.69]
        assert metrics["importance/masked" + suffix] == pytest.approx(share)
        assert metrics["importance/mean" + suffix] == pytest.approx(sum(kept) / len(PARTS[suffix]))
    assert "importance/truncated" not in metrics


def test_a_response_counts_once_where_it_has_one_weight(groups: list[Group]) -> None:
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.logprob_old is not None
            ratio = math.exp((rollout.logprob_old - rollout.logprob_rollout).sum())
            rollout.importance = np.full(len(rollout.token_ids), min(ratio, 1.25))
    algorithm = AlgorithmConfig(importance_correction="truncated", importance_level="sequence", importance_high=1.25)
    metrics = mismatch_metrics(groups, algorithm)
    weights = [math.exp(0.2), math.exp(-0.1), 1.25, 1.25, math.exp(-1.1)]  # Σ of the five responses
    assert metrics["importance/mean"] == pytest.approx(np.mean(weights))
    assert metrics["importance/truncated"] == pytest.approx(2 / 5)
    assert metrics["importance/truncated_original"] == pytest.approx(1 / 3)
    assert metrics["importance/truncated_3_images"] == pytest.approx(1 / 2)


def test_without_the_trainers_log_probabilities_no_gap_is_claimed(groups: list[Group]) -> None:
    for group in groups:
        for rollout in group.rollouts:
            rollout.logprob_old = None
    assert mismatch_metrics(groups, AlgorithmConfig(old_policy="engine")) == {}


def test_a_part_that_was_not_sampled_is_left_out(groups: list[Group]) -> None:
    groups[1].rollouts.clear()
    groups[0].rollouts[-1].token_ids = np.zeros(0, np.int64)  # the only permuted one: a response without tokens
    names = mismatch_metrics(groups, AlgorithmConfig())
    assert "logprob_gap/mean_2_images" in names
    assert not any(name.endswith(("_3_images", "_permuted")) for name in names)


def test_after_the_originals_prompt_only_original_views_are_comparable(groups: list[Group]) -> None:
    """The trainer's log-probabilities of a permuted view's response are then of another prompt than the engine's."""
    metrics = mismatch_metrics(groups, AlgorithmConfig(loss_view="original"))
    check_names(metrics)
    expected = np.mean(np.abs(PARTS["_original"]))
    assert metrics["logprob_gap/mean"] == metrics["logprob_gap/mean_original"] == pytest.approx(expected)
    assert not any("permuted" in name for name in metrics)


def test_shaping_parts_and_penalties_are_logged_where_there_are_any(groups: list[Group]) -> None:
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        rollout.reward, rollout.reward_parts = 1.0, {"accuracy": 1.0, "format": 1.0}
    questions = [DrawnQuestion(group.record, draw, 0, 0, group) for draw, group in enumerate(groups)]
    questions[0].decide("kept", "kept")
    questions[1].decide("dropped", "no_signal")
    plain = rollout_metrics(Drawn(0, questions))
    check_names(plain)
    assert not {"reward/part/consistency", "reward/part/overlong", "reward/kl_penalty"} & set(plain)
    for number, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        rollout.reward_parts |= {"consistency": number % 2, "overlong": -0.5}
        rollout.kl_penalty = 0.1 * number if number < 3 else None
    metrics = rollout_metrics(Drawn(0, questions))
    check_names(metrics)
    assert metrics["reward/part/consistency"] == pytest.approx(0.4)
    assert metrics["reward/part/overlong"] == -0.5
    assert metrics["reward/kl_penalty"] == pytest.approx(0.1)


def test_a_step_of_carried_groups_alone_has_sampled_nothing(groups: list[Group]) -> None:
    """The rewards of carried groups were logged when they were sampled."""
    for group in groups:
        for number, rollout in enumerate(group.rollouts):
            rollout.reward, rollout.reward_parts = float(number), {"accuracy": 0.0, "format": 1.0}
    waiting, late = (DrawnQuestion(group.record, draw, 2, 0, group) for draw, group in enumerate(groups))
    waiting.decide("kept", "kept")
    late.decide("dropped", EXPIRED)
    metrics = rollout_metrics(Drawn(3, [waiting, late]))
    check_names(metrics)
    counts = {"kept": 1, "carried": 0, "dropped": 1, "dropped_expired": 1, "refills": 0}
    assert metrics == {f"groups/{name}": count for name, count in counts.items()}
    assert rollout_metrics(Drawn(2, [waiting, late]))["reward/accuracy"] == 0


def test_every_part_of_the_reward_has_its_mean(groups: list[Group]) -> None:
    for group in groups:
        for number, rollout in enumerate(group.rollouts):
            rollout.reward, rollout.reward_parts = 0.0, {"accuracy": 1.0, "format": 0.0, "brevity": float(number)}
    question = DrawnQuestion(groups[0].record, 0, 1, 0, groups[0])
    question.decide("kept", "kept")
    metrics = rollout_metrics(Drawn(1, [question]))
    check_names(metrics)
    parts = {"accuracy": 1.0, "format": 0.0, "brevity": 1.0}  # brevity: of 0, 1 and 2
    assert {name: metrics[f"reward/part/{name}"] for name in parts} == parts
