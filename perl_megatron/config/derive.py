"""Everything that follows from a config and a number of processes; refuses what cannot run, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive_algorithm import check_algorithm, check_objective
from perl_megatron.config.derive_engine import (
    Engine,
    check_staleness,
    engine_replicas,
    engine_tensor_size,
    resolve_engine,
)
from perl_megatron.config.derive_filter import check_filter
from perl_megatron.config.derive_model import check_fp8, check_parts, check_psutil, check_sharing
from perl_megatron.config.derive_reward import check_reward
from perl_megatron.config.layout import check_layout, check_split, join_numbers, stage_layers
from perl_megatron.config.schema import Config, EvaluationConfig, RolloutConfig
from perl_megatron.errors import UserError

Command = Literal["train", "sft", "eval"]


@dataclass(frozen=True)
class Derived:
    """The arithmetic of a run. A question is a record; a sequence is one response with its prompt."""

    world_size: int
    """Processes."""
    tensor_size: int
    pipeline_size: int
    context_size: int
    data_size: int
    """Data-parallel size: world over tensor times pipeline times context."""
    virtual_pipeline_size: int
    """Model chunks of each pipeline stage."""
    stage_layers: tuple[int, ...]
    """Language-model layers of each pipeline stage."""
    engine: Engine
    engine_tensor_size: int
    """Processes of the run that one engine replica is spread over; 1 with servers, which have their own."""
    engine_replicas: int
    """Engine replicas, or servers, which share each step's questions."""
    views_per_question: int
    """n_s + 1."""
    rollouts_per_view: int
    """n."""
    group_size: int
    """(n_s + 1) · n: responses that are compared with each other."""
    questions_per_step: int
    rollouts_per_step: int
    """Responses of the kept groups of one step."""
    updates_per_step: int
    """Optimizer steps in one training step."""
    questions_per_update: int
    sequences_per_update: int
    total_steps: int
    total_updates: int
    """Optimizer steps of the whole run; the learning-rate schedule counts these."""
    total_questions: int
    total_rollouts: int
    """Responses trained on over the whole run."""
    max_sequence_tokens: int
    """Longest prompt plus longest response, in training or evaluation."""


def derive(
    config: Config,
    *,
    world_size: int,
    architecture: ArchitectureNumbers,
    command: Command = "train",
    elsewhere: bool = False,
) -> Derived:
    """Check that the config can run on `world_size` processes and compute what follows from it.

    Raises UserError, naming the option and the alternatives, for an impossible layout or a contradiction. `command`
    says which parts matter: batches of groups only for training. `elsewhere`: it will run on another machine, on GPUs,
    and what is installed on this one does not matter.
    """
    data_size = check_layout(config.parallel, world_size)
    check_split(config.parallel, architecture)
    _check_sections(config)
    if command != "eval":  # which builds no policy, only an engine
        if not elsewhere:
            check_psutil()
        check_parts(config.optimizer)
        check_objective(config.algorithm)
        check_fp8(config.model, config.parallel, architecture, elsewhere=elsewhere)
        check_sharing(config.actor, config.parallel)
    engine = resolve_engine(config, elsewhere=elsewhere)
    if command == "train":
        _check_training(config, data_size)
        check_staleness(config)
    parallel, rollout = config.parallel, config.rollout
    engine_tensor = engine_tensor_size(config, engine, world_size, architecture)
    views = config.permutation.num_permuted + 1
    group_size = views * rollout.num_rollouts
    if command == "sft":
        steps, updates, sequences = config.supervised.steps, 1, config.supervised.batch_size
        questions_per_step = questions_per_update = sequences
    else:
        steps, updates, questions_per_step = (
            config.run.steps,
            config.algorithm.updates_per_step,
            rollout.questions_per_step,
        )
        questions_per_update = questions_per_step // updates
        sequences = questions_per_update * group_size
    return Derived(
        world_size=world_size,
        tensor_size=parallel.tensor,
        pipeline_size=parallel.pipeline,
        context_size=parallel.context,
        data_size=data_size,
        virtual_pipeline_size=parallel.virtual_pipeline,
        stage_layers=stage_layers(parallel, architecture.num_layers),
        engine=engine,
        engine_tensor_size=engine_tensor,
        engine_replicas=engine_replicas(config, engine, world_size // engine_tensor),
        views_per_question=views,
        rollouts_per_view=rollout.num_rollouts,
        group_size=group_size,
        questions_per_step=questions_per_step,
        rollouts_per_step=0 if command == "sft" else questions_per_step * group_size,
        updates_per_step=updates,
        questions_per_update=questions_per_update,
        sequences_per_update=sequences,
        total_steps=steps,
        total_updates=steps * updates,
        total_questions=steps * questions_per_step,
        total_rollouts=0 if command == "sft" else steps * questions_per_step * group_size,
        max_sequence_tokens=config.data.max_prompt_tokens
        + max(rollout.max_response_tokens, config.evaluation.max_response_tokens or 0),
    )


def require_training_data(config: Config) -> None:
    """UserError where `data.train` is not set or does not exist, or `data.evaluation` is set and does not exist."""
    if not config.data.train:
        raise UserError("there is no training data", where="data.train", fix="set it to a JSON-lines file of records")
    for path in config.data.train:
        _require("data.train", path, folder=True)
    if config.data.evaluation is not None:
        _require("data.evaluation", config.data.evaluation)


def require_evaluation_data(config: Config) -> None:
    """UserError where `data.evaluation` is not set or does not exist."""
    if config.data.evaluation is None:
        fix = "set it to a JSON-lines file of held-out records, or set evaluation.benchmarks"
        raise UserError("there is no evaluation data", where="data.evaluation", fix=fix)
    _require("data.evaluation", config.data.evaluation)


def _require(key: str, path: Path, *, folder: bool = False) -> None:
    if not (path.is_file() or (folder and path.is_dir())):
        raise UserError(
            f"the file {path} does not exist",
            where=key,
            fix=f"paths in a config are relative to the current directory, {Path.cwd()}",
        )


def check_endpoint_evaluation(config: Config) -> None:
    """UserError where `perl-megatron eval` could not ask an endpoint."""
    check_answers(config.evaluation, config.rollout)
    if not config.endpoint.url:
        raise UserError(
            "there is no endpoint to ask",
            where="evaluation.ask = endpoint",
            fix="set endpoint.url, such as http://127.0.0.1:8000/v1",
        )


def check_answers(evaluation: EvaluationConfig, rollout: RolloutConfig) -> None:
    """UserError where an evaluation asks for the same answer several times, or for more at once than a server takes."""
    if evaluation.num_rollouts > 1 and evaluation.temperature == 0:
        raise UserError(
            f"{evaluation.num_rollouts} greedy answers to a question are {evaluation.num_rollouts} times the same",
            where="evaluation.num_rollouts, evaluation.temperature = 0",
            fix="set evaluation.temperature=1, or evaluation.num_rollouts=1",
        )
    if rollout.engine == "server" and evaluation.num_rollouts > rollout.max_concurrent_sequences:
        raise UserError(
            f"all {evaluation.num_rollouts} answers to a question are one request, and a server takes at most "
            f"{rollout.max_concurrent_sequences} sequences at once",
            where="evaluation.num_rollouts, rollout.max_concurrent_sequences",
            fix="make rollout.max_concurrent_sequences at least evaluation.num_rollouts",
        )


def _check_sections(config: Config) -> None:
    data, optimizer = config.data, config.optimizer
    check_answers(config.evaluation, config.rollout)
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise UserError(
            f"images cannot have at least {data.min_pixels} and at most {data.max_pixels} pixels",
            where="data.min_pixels, data.max_pixels",
            fix="make data.min_pixels the smaller one",
        )
    if data.weights is not None and len(data.weights) != len(data.train):
        raise UserError(
            f"there are {len(data.weights)} weights for {len(data.train)} paths",
            where="data.weights, data.train",
            fix="give one weight for each path of data.train, or none at all",
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise UserError(
            f"the final learning rate {optimizer.min_learning_rate} is above the peak {optimizer.learning_rate}",
            where="optimizer.min_learning_rate, optimizer.learning_rate",
            fix="make optimizer.min_learning_rate the smaller one",
        )


def _check_training(config: Config, data_size: int) -> None:
    rollout, updates = config.rollout, config.algorithm.updates_per_step
    group_size = (config.permutation.num_permuted + 1) * rollout.num_rollouts
    if group_size < 2:
        raise UserError(
            "a group of one response gives no learning signal: nothing to compare it with",
            where="rollout.num_rollouts = 1, permutation.num_permuted = 0",
            fix="set rollout.num_rollouts to 2 or more, or permutation.num_permuted to 1 or more",
        )
    if rollout.questions_per_step % updates:
        possible = [number for number in range(1, 65) if rollout.questions_per_step % number == 0]
        raise UserError(
            f"{rollout.questions_per_step} questions a step cannot be split into {updates} equal updates",
            where=f"rollout.questions_per_step = {rollout.questions_per_step}, algorithm.updates_per_step = {updates}",
            fix=f"algorithm.updates_per_step may be {join_numbers(possible)}",
        )
    sequences = rollout.questions_per_step // updates * group_size
    if sequences < data_size:
        raise UserError(
            f"an update of {sequences} sequences leaves some of {data_size} data-parallel ranks without work",
            where="rollout.questions_per_step, algorithm.updates_per_step",
            fix="ask more questions in a step, or use fewer processes",
        )
    check_filter(config)
    permutation = config.permutation
    if permutation.schedule == "exponential" and permutation.coefficient >= 1:
        raise UserError(
            f"the exponential schedule 1 - c^(T-t) needs c below 1, and c is {permutation.coefficient}",
            where="permutation.coefficient",
            fix="set permutation.coefficient=0.9, say, or another permutation.schedule (linear, power, constant)",
        )
    check_algorithm(config)
    check_reward(config)
