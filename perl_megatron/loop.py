"""Permuted GRPO: PeRL's Algorithm 1 as one loop. Every rank runs every line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from perl_megatron.algorithm.importance import bounded_weights, importance_ratio
from perl_megatron.algorithm.objective import kl_penalty
from perl_megatron.collect import assign_advantages
from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.data.planner import swap_probability
from perl_megatron.drawn import Drawn
from perl_megatron.step_metrics import rollout_metrics
from perl_megatron.supervised_session import SupervisedSession
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.training_session import TrainingSession
from perl_megatron.types import Group


def train(session: TrainingSession) -> None:
    """Run the session from where its last checkpoint left it until `run.steps`, or until it is asked to stop."""
    config = session.config
    step, phases = session.restore(), session.phases
    if session.owes_evaluation(step) and not session.stop_requested():
        session.evaluate(step)
    while step < config.run.steps and not session.stop_requested():
        alpha = swap_probability(config.permutation, step, config.run.steps)
        with session.saved_on_user_error(step), phases("generate", step=step):
            session.await_rollouts(step)  # begun during the last update, where rollout.max_staleness allows it
        with session.saved_on_user_error(step), phases("sync", step=step):
            session.sync_weights(step)
        with session.saved_on_user_error(step), phases("generate", step=step, **session.position()):
            drawn = session.collector.collect(step, alpha)
        if drawn.is_interrupted:
            break  # the groups are kept for when the run is resumed
        if drawn.ends_run:
            session.end_of_questions(drawn)
            break
        session.rest_engine(step)
        with phases("log_probs", **drawn.facts()):
            add_log_probs(session, drawn.kept)
        penalize_divergence(drawn.kept, config.algorithm)
        assign_advantages(drawn.kept, config.algorithm)
        weigh_by_importance(drawn.kept, config.algorithm)
        with phases("update", **drawn.facts()):
            updates = [
                session.update(step, lay_out(groups, config.algorithm))
                for groups in mini_batches(drawn, config.algorithm.updates_per_step)
            ]
        step += 1
        session.log_step(step, drawn, updates, {"permutation/alpha": alpha, **rollout_metrics(drawn)})
        session.save_and_evaluate_if_due(step)
    session.finish(step)


def add_log_probs(session: TrainingSession, groups: Sequence[Group]) -> None:
    """log π_old and log π_ref of every kept rollout, by the trainer (π_old is π_θ before the step's first update).

    Where `algorithm.old_policy` is the engine, log π_old is not computed, and ``lay_out`` takes the engine's instead.
    """
    algorithm = session.config.algorithm
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sequences = lay_out(groups, algorithm)
    if algorithm.old_policy == "trainer":
        for rollout, logprob in zip(rollouts, session.actor.log_probs(sequences), strict=True):
            rollout.logprob_old = logprob
    if algorithm.kl_coefficient > 0:
        for rollout, logprob in zip(rollouts, session.actor.reference_log_probs(sequences), strict=True):
            rollout.logprob_ref = logprob


def penalize_divergence(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """β · KL of every kept rollout, to be taken off its reward, where `algorithm.kl_in` says so."""
    if algorithm.kl_in == "loss":
        return
    for group in groups:
        for rollout in group.rollouts:
            old = rollout.logprob_rollout if algorithm.old_policy == "engine" else rollout.logprob_old
            assert old is not None, "the KL penalty is that of π_old"
            assert rollout.logprob_ref is not None, "the KL penalty is taken against π_ref"
            rollout.kl_penalty = kl_penalty(
                old, rollout.logprob_ref, coefficient=algorithm.kl_coefficient, estimator=algorithm.kl_estimator
            )


def weigh_by_importance(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """The bounded weights π_old / π_rollout of every kept rollout, where they are asked for."""
    if algorithm.importance_correction == "off":
        return
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.logprob_old is not None, "the importance weight is taken against the trainer's π_old"
            rollout.importance = bounded_weights(
                importance_ratio(rollout.logprob_old, rollout.logprob_rollout, algorithm.importance_level),
                algorithm.importance_correction,
                low=algorithm.importance_low,
                high=algorithm.importance_high,
            )


def lay_out(groups: Sequence[Group], algorithm: AlgorithmConfig) -> list[TrainingSequence]:
    """One training sequence for each rollout, conditioned on its own view x_i, or on what `algorithm.loss_view` says.

    With 'original' every log-probability is that of the response after view 0's prompt, which a permuted view's rollout
    was not sampled from: NoisyRollout (Liu et al. 2025, arXiv 2504.13055), whose distorted images do not change the
    answer. Where the answer follows the order, that trains the policy towards an answer that is wrong for the prompt it
    is conditioned on: with x_0 it is asked to raise the probability of the option that was right in x_i, and of other
    ones for the other views. PeRL warns of this collapse, and conditions on x_i.
    """
    by_engine = algorithm.old_policy == "engine"
    return [
        TrainingSequence(
            prompt=group.prompts[rollout.view_index if algorithm.loss_view == "own" else 0],
            response=rollout.token_ids,
            logprob_old=rollout.logprob_rollout if by_engine else rollout.logprob_old,
            logprob_ref=rollout.logprob_ref,
            advantage=rollout.advantage or 0.0,
            importance=rollout.importance,
        )
        for group in groups
        for rollout in group.rollouts
    ]


def mini_batches(drawn: Drawn, count: int) -> list[list[Group]]:
    """The kept groups in ``count`` parts of almost equal size, in order; empty parts are left out."""
    kept = drawn.kept
    bounds = [len(kept) * part // count for part in range(count + 1)]
    return [kept[start:end] for start, end in pairwise(bounds) if end > start]


def supervise(session: SupervisedSession) -> None:
    """Supervised warm start: imitate the records' demonstrations, through the same actor."""
    step = session.restore()
    while step < session.total_steps and not session.stop_requested():
        with session.phases("update", step=step, **session.position()):
            metrics = session.update(step, session.demonstrations())
        step += 1
        session.log_supervised_step(step, metrics)
        session.save_if_due(step)
    session.finish(step)
