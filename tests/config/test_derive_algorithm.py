"""Contradictions of the algorithm are refused, each naming both settings and a way out."""

import pytest
from derive_case import TINY

from perl_megatron.config.derive import derive
from perl_megatron.config.derive_algorithm import check_algorithm, check_objective
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.errors import UserError


@pytest.mark.parametrize("ratio", ["sequence", "sequence_mean"])
def test_a_responses_ratio_goes_with_the_mean_over_responses(ratio):
    check_objective(AlgorithmConfig(ratio=ratio, aggregation="sequence"))
    check_objective(AlgorithmConfig())
    with pytest.raises(UserError, match=rf"algorithm.ratio = {ratio}(.|\n)*algorithm.aggregation=sequence"):
        check_objective(AlgorithmConfig(ratio=ratio))


@pytest.mark.parametrize("correction", ["truncated", "masked"])
def test_the_engines_log_probabilities_leave_nothing_to_correct(correction):
    check_objective(AlgorithmConfig(old_policy="engine"))
    check_objective(AlgorithmConfig(importance_correction=correction))
    with pytest.raises(UserError, match="nothing to correct") as refused:
        check_objective(AlgorithmConfig(old_policy="engine", importance_correction=correction))
    assert f"algorithm.importance_correction = {correction}" in refused.value.where
    assert "algorithm.old_policy=trainer" in refused.value.fix


def test_the_bounds_of_importance_weights_hold_one():
    """Else equal log-probabilities would be cut or left out."""
    AlgorithmConfig(importance_low=1, importance_high=1)
    for bounds in ({"importance_low": 1.1}, {"importance_low": -0.1}, {"importance_high": 0.9}):
        with pytest.raises(ValueError, match=next(iter(bounds))):
            AlgorithmConfig(**bounds)


def check(*overrides):
    check_algorithm(load_config(None, ["model.path=m", *overrides]).config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.advantage_level=view", "permutation.num_permuted=0"],
        ["algorithm.advantage_level=two_level", "rollout.num_rollouts=2"],
        ["algorithm.kl_in=reward"],
        ["algorithm.objective=cispo", "algorithm.aggregation=constant"],
        ["algorithm.objective=cispo", "algorithm.dual_clip=null"],
        ["algorithm.loss_view=original"],
        ["reward.consistency=1"],
        ["reward.overlong=1", "reward.overlong_buffer=2048"],
        ["reward.overlong_buffer=4096"],
    ],
)
def test_what_goes_together(overrides):
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (["algorithm.advantage_level=two_level", "permutation.num_permuted=0"], "no two levels", "num_permuted to 1"),
        (
            ["algorithm.advantage_level=two_level", "rollout.num_rollouts=1"],
            "nothing to compare",
            "advantage_level=joint",
        ),
        (["algorithm.advantage_level=view", "rollout.num_rollouts=1"], "nothing to compare", "num_rollouts to 2"),
        (["algorithm.kl_in=reward", "algorithm.kl_coefficient=0"], "no KL term", "algorithm.kl_in=loss"),
        (
            ["algorithm.objective=cispo", "algorithm.ratio=sequence", "algorithm.aggregation=sequence"],
            "its own ratio",
            "algorithm.ratio=token",
        ),
        (["algorithm.ratio=sequence", "algorithm.aggregation=constant"], "mean over responses", "aggregation=sequence"),
        (["algorithm.loss_view=original", "algorithm.old_policy=engine"], "sampled from", "old_policy=trainer"),
        (
            ["algorithm.loss_view=original", "algorithm.importance_correction=masked"],
            "between two prompts",
            "importance_correction=off",
        ),
        (["reward.consistency=0.5", "permutation.num_permuted=0"], "no other views", "reward.consistency=0"),
    ],
)
def test_what_does_not(overrides, what, fix):
    with pytest.raises(UserError) as refused:
        check(*overrides)
    assert what in refused.value.what
    assert fix in str(refused.value.fix)
    for override in overrides[:2]:
        assert f"{override.partition('=')[0]} = " in f"{refused.value.where} ", override


def test_a_penalty_that_begins_before_the_first_token():
    with pytest.raises(UserError, match="512 tokens before the limit of 100") as refused:
        check("reward.overlong=0.5", "rollout.max_response_tokens=100")
    assert "reward.overlong_buffer=20" in str(refused.value.fix)


def test_training_is_refused_before_it_starts():
    """By `derive`, as all contradictions."""
    overrides = ["model.path=m", "rollout.engine=embedded", "reward.overlong=1", "rollout.max_response_tokens=9"]
    config = load_config(None, overrides)
    with pytest.raises(UserError, match="overlong_buffer"):
        derive(config.config, world_size=1, architecture=TINY)
    derive(config.config, world_size=1, architecture=TINY, command="eval")
