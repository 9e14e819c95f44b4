"""From config to objects: the only place that knows which class serves which setting."""

from __future__ import annotations

import logging
from typing import cast

import torch

from perl_megatron.ahead import AheadCollector
from perl_megatron.collect import GroupCollector
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import Command, Derived, derive
from perl_megatron.config.load import LoadedConfig
from perl_megatron.config.schema import Config, PermutationConfig
from perl_megatron.data.node_folder import node_pixels
from perl_megatron.data.planner import swap_probability
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.question_stream import QuestionStream
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.questions import most_images, read_questions, training_questions
from perl_megatron.reward.functions import load_functions
from perl_megatron.rollout.engine import RolloutEngine, vllm_obstacle
from perl_megatron.rollout.server_engine import ServerEngine
from perl_megatron.runtime import platform
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.topology import Topology
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.supervised_session import SupervisedSession
from perl_megatron.train.actor import Actor
from perl_megatron.training_session import TrainingSession
from perl_megatron.types import Record

logger = logging.getLogger(__name__)


def derive_for(config: Config, world_size: int, command: Command) -> Derived:
    """The arithmetic of a run on ``world_size`` processes; UserError for what cannot run."""
    return derive(
        config, world_size=world_size, architecture=read_architecture_numbers(config.model.path), command=command
    )


def build_training(
    loaded: LoadedConfig,
    topology: Topology,
    *,
    resume: bool,
    stop: StopRequest,
    memory: PeakMemory | None,
    watchdog: Watchdog,
) -> TrainingSession:
    """Everything that permuted GRPO needs. Data are read and checked before the policy and the engine are built."""
    config = loaded.config
    derived = derive_for(config, topology.world_size, "train")
    load_functions(config.reward)  # one that is not there ends the run before anything slow is built
    encoder = build_encoder(config)
    questions = training_questions(config, encoder)
    if not resume:  # else the position is not known yet
        questions.prepare()
    evaluation_records: tuple[Record, ...] = ()
    if config.data.evaluation is not None:
        evaluation_records = read_questions(config, config.data.evaluation, "data.evaluation", encoder)
    actor = Actor(config, topology, encoder, total_steps=derived.total_updates)
    max_images = max(
        most_images(questions.records, config.permutation), most_images(evaluation_records, PermutationConfig())
    )
    engine = build_engine(config, derived, encoder, topology, max_images)
    return TrainingSession(
        loaded,
        topology,
        actor,
        encoder,
        questions,
        total_steps=config.run.steps,
        resume=resume,
        stop=stop,
        memory=memory,
        watchdog=watchdog,
        engine=engine,
        collector=build_collector(config, questions, encoder, engine),
        evaluation_records=evaluation_records,
    )


def build_supervised(
    loaded: LoadedConfig,
    topology: Topology,
    *,
    resume: bool,
    stop: StopRequest,
    memory: PeakMemory | None,
    watchdog: Watchdog,
) -> SupervisedSession:
    """Everything that the supervised warm start needs."""
    # The reference policy would only take memory here.
    config = loaded.config.model_copy(
        update={"algorithm": loaded.config.algorithm.model_copy(update={"kl_coefficient": 0.0})}
    )
    encoder = build_encoder(config)
    questions = training_questions(config, encoder, demonstrations=True)
    if not resume:
        questions.prepare()
    actor = Actor(config, topology, encoder, total_steps=config.supervised.steps)
    return SupervisedSession(
        loaded,
        topology,
        actor,
        encoder,
        questions,
        total_steps=config.supervised.steps,
        resume=resume,
        stop=stop,
        memory=memory,
        watchdog=watchdog,
    )


def build_encoder(config: Config) -> PromptEncoder:
    """The checkpoint's processor with the config's system prompt and image bounds; a node's share their pixels.

    Collective.
    """
    return PromptEncoder(
        config.model.path,
        system_prompt=config.data.system_prompt,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        pixels=node_pixels(config.data.pixel_cache_mib * 2**20),
    )


def build_engine(
    config: Config, derived: Derived, encoder: PromptEncoder, topology: Topology, max_images: int
) -> RolloutEngine:
    """The rollout engine of `rollout.engine`; third-party engines are imported only when they are chosen.

    ``max_images`` bounds the images of a prompt.
    """
    obstacle = vllm_obstacle(cuda=platform.is_cuda())
    if topology.rank == 0 and config.rollout.engine == "auto" and obstacle is not None:
        logger.warning("rollouts by the embedded engine: %s", obstacle)
    if derived.engine == "server":
        return ServerEngine(
            config.rollout,
            encoder=encoder,
            model_path=config.model.path,
            dtype=getattr(torch, config.model.dtype),
            max_model_length=derived.max_sequence_tokens,
        )
    if derived.engine == "vllm" and (config.rollout.engine == "vllm" or obstacle is None):
        from perl_megatron.rollout.vllm_colocated import VllmColocatedEngine

        return VllmColocatedEngine(
            config.rollout,
            encoder=encoder,
            model_path=config.model.path,
            topology=topology,
            tensor_parallel_size=derived.engine_tensor_size,
            seed=config.run.seed,
            dtype=getattr(torch, config.model.dtype),
            max_model_length=derived.max_sequence_tokens,
            max_images=max_images,
        )
    from perl_megatron.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(
        config.rollout, encoder=encoder, model_path=config.model.path, dtype=getattr(torch, config.model.dtype)
    )


def build_collector(
    config: Config, questions: QuestionStream, encoder: PromptEncoder, engine: RolloutEngine
) -> GroupCollector | AheadCollector:
    """Collects a step's groups, or with `rollout.max_staleness` also the next one's during the update."""
    collector = GroupCollector(config, questions, encoder, engine)
    if config.rollout.max_staleness == 0:
        return collector
    run, permutation = config.run, config.permutation
    return AheadCollector(
        collector,
        cast(ServerEngine, engine),  # `derive` has refused others
        lambda step: swap_probability(permutation, step, run.steps),
        num_steps=run.steps,
        timeout_seconds=config.deadlines.collective_timeout,
    )
