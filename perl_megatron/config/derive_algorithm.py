"""Checks that the parts of the algorithm go together; ``derive`` calls them."""

from __future__ import annotations

from perl_megatron.config.schema import AlgorithmConfig, Config
from perl_megatron.errors import UserError


def check_algorithm(config: Config) -> None:
    """UserError where advantages or rewards contradict how many views and responses a question has.

    Also where a part of the algorithm that is asked for could do nothing, or would do something else than it says.
    """
    check_objective(config.algorithm)
    _check_loss_view(config)
    _check_levels(config)
    _check_rewards(config)
    algorithm = config.algorithm
    if algorithm.kl_in == "reward" and algorithm.kl_coefficient == 0:
        raise UserError(
            "there is no KL term to take off the reward",
            where="algorithm.kl_in = reward, algorithm.kl_coefficient = 0",
            fix="set algorithm.kl_coefficient above 0, or algorithm.kl_in=loss",
        )


def check_objective(algorithm: AlgorithmConfig) -> None:
    """UserError where parts of the objective do not go together.

    That is the ratio of a whole response weighted token by token, or bounded as CISPO does: neither is a known
    objective. And a correction for the engine's probabilities where the ratio is taken against them already, or where
    the loss is not conditioned on the prompt that they are of.
    """
    if algorithm.old_policy == "engine" and algorithm.importance_correction != "off":
        raise UserError(
            "there is nothing to correct: with the engine's log-probabilities as log π_old the ratio π_θ / π_old is "
            "the importance weight already",
            where=f"algorithm.old_policy = engine, algorithm.importance_correction = {algorithm.importance_correction}",
            fix="set algorithm.old_policy=trainer, or algorithm.importance_correction=off",
        )
    if algorithm.objective == "cispo" and algorithm.ratio != "token":
        raise UserError(
            "CISPO weighs each token by its own ratio, not by one of the whole response",
            where=f"algorithm.objective = cispo, algorithm.ratio = {algorithm.ratio}",
            fix="set algorithm.ratio=token, or algorithm.objective=clipped",
        )
    if algorithm.ratio != "token" and algorithm.aggregation != "sequence":
        raise UserError(
            "one ratio for a whole response goes with a mean over responses, not over tokens",
            where=f"algorithm.ratio = {algorithm.ratio}, algorithm.aggregation = {algorithm.aggregation}",
            fix="set algorithm.aggregation=sequence, or algorithm.ratio=token",
        )
    if algorithm.loss_view == "original" and algorithm.old_policy == "engine":
        raise UserError(
            "the engine's log-probabilities are those of a response after the prompt it was sampled from, and the loss "
            "is conditioned on the original's",
            where="algorithm.loss_view = original, algorithm.old_policy = engine",
            fix="set algorithm.old_policy=trainer, or algorithm.loss_view=own",
        )
    if algorithm.loss_view == "original" and algorithm.importance_correction != "off":
        raise UserError(
            "the importance weight would be between two prompts, not between the engine and the trainer",
            where=f"algorithm.loss_view = original, algorithm.importance_correction = "
            f"{algorithm.importance_correction}",
            fix="set algorithm.importance_correction=off, or algorithm.loss_view=own",
        )


def _check_loss_view(config: Config) -> None:
    algorithm, permutation = config.algorithm, config.permutation
    if algorithm.loss_view == "original" and permutation.recover_order > 0 and permutation.num_permuted > 0:
        raise UserError(
            "the answer to a question about the order depends on the order, and the loss of a permuted view's response "
            "would be conditioned on the original's, for which it is wrong",
            where=f"algorithm.loss_view = original, permutation.recover_order = {permutation.recover_order}",
            fix="set permutation.recover_order=0, or algorithm.loss_view=own",
        )


def _check_levels(config: Config) -> None:
    level, copies, rollouts = (
        config.algorithm.advantage_level,
        config.permutation.num_permuted,
        config.rollout.num_rollouts,
    )
    if level == "two_level" and copies == 0:
        raise UserError(
            "there are no two levels: a question has one view",
            where="algorithm.advantage_level = two_level, permutation.num_permuted = 0",
            fix="set permutation.num_permuted to 1 or more, or algorithm.advantage_level=joint",
        )
    if level != "joint" and rollouts == 1:
        raise UserError(
            "a view with one response has nothing to compare it with",
            where=f"algorithm.advantage_level = {level}, rollout.num_rollouts = 1",
            fix="set rollout.num_rollouts to 2 or more, or algorithm.advantage_level=joint",
        )


def _check_rewards(config: Config) -> None:
    reward, limit = config.reward, config.rollout.max_response_tokens
    if reward.consistency > 0 and config.permutation.num_permuted == 0:
        raise UserError(
            "there are no other views to be consistent with",
            where=f"reward.consistency = {reward.consistency}, permutation.num_permuted = 0",
            fix="set permutation.num_permuted to 1 or more, or reward.consistency=0",
        )
    if reward.overlong > 0 and reward.overlong_buffer > limit:
        raise UserError(
            f"the penalty for long responses would begin {reward.overlong_buffer} tokens before the limit of {limit}",
            where=f"reward.overlong_buffer = {reward.overlong_buffer}, rollout.max_response_tokens = {limit}",
            fix=f"set reward.overlong_buffer={max(1, limit // 5)}, say (DAPO's is a fifth), or reward.overlong=0",
        )


def check_old_rollouts(algorithm: AlgorithmConfig, *, what: str, where: str) -> None:
    """UserError where ``what`` was sampled by an older policy, and nothing in the objective would know."""
    if algorithm.old_policy == "trainer" and algorithm.importance_correction == "off":
        raise UserError(
            f"{what} were sampled by an older policy, and with the trainer's recomputed log-probabilities as log π_old "
            "nothing in the objective would know",
            where=f"{where}, algorithm.old_policy = trainer, algorithm.importance_correction = off",
            fix="set algorithm.old_policy=engine, or algorithm.importance_correction=truncated (or masked)",
        )
