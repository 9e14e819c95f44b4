"""From config to objects: the only place that knows which class serves which setting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from perl_megatron.ahead import AheadCollector
from perl_megatron.collect import GroupCollector
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import Command, Derived, derive
from perl_megatron.config.load import LoadedConfig
from perl_megatron.config.schema import Config
from perl_megatron.data.permutation import apply_order
from perl_megatron.data.planner import swap_probability
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.records import Dataset, DroppedRecord, read_records
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.errors import UserError
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.reward.functions import load_functions
from perl_megatron.reward.grade import check_expected
from perl_megatron.rollout.engine import RolloutEngine, vllm_obstacle
from perl_megatron.rollout.server_engine import ServerEngine
from perl_megatron.runtime import platform
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.topology import Topology
from perl_megatron.session import SupervisedSession
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
    loaded: LoadedConfig, topology: Topology, *, resume: bool, stop: StopRequest, memory: PeakMemory | None
) -> TrainingSession:
    """Everything that permuted GRPO needs. Data are read and checked before the policy and the engine are built."""
    config = loaded.config
    derived = derive_for(config, topology.world_size, "train")
    load_functions(config.reward)  # one that is not there ends the run before anything slow is built
    encoder = build_encoder(config)
    records = read_questions(config, config.data.train, "data.train", encoder)
    evaluation_records: tuple[Record, ...] = ()
    if config.data.evaluation is not None:
        evaluation_records = read_questions(config, config.data.evaluation, "data.evaluation", encoder)
    actor = Actor(config, topology, encoder, total_steps=derived.total_updates)
    engine = build_engine(config, derived, encoder, topology, (*records, *evaluation_records))
    sampler = ShuffledSampler(len(records), config.run.seed)
    return TrainingSession(
        loaded,
        topology,
        actor,
        encoder,
        records,
        sampler,
        total_steps=config.run.steps,
        resume=resume,
        stop=stop,
        memory=memory,
        engine=engine,
        collector=build_collector(config, records, sampler, encoder, engine),
        evaluation_records=evaluation_records,
    )


def build_supervised(
    loaded: LoadedConfig, topology: Topology, *, resume: bool, stop: StopRequest, memory: PeakMemory | None
) -> SupervisedSession:
    """Everything that the supervised warm start needs."""
    # The reference policy would only take memory here.
    config = loaded.config.model_copy(
        update={"algorithm": loaded.config.algorithm.model_copy(update={"kl_coefficient": 0.0})}
    )
    encoder = build_encoder(config)
    records = read_questions(config, config.data.train, "data.train", encoder)
    with_demonstration = tuple(record for record in records if record.demonstration is not None)
    if not with_demonstration:
        raise UserError(
            "no record has a demonstration to imitate",
            where=f"data.train = {config.data.train}",
            fix="add the field 'demonstration' to the records",
        )
    actor = Actor(config, topology, encoder, total_steps=config.supervised.steps)
    return SupervisedSession(
        loaded,
        topology,
        actor,
        encoder,
        with_demonstration,
        ShuffledSampler(len(with_demonstration), config.run.seed),
        total_steps=config.supervised.steps,
        resume=resume,
        stop=stop,
        memory=memory,
    )


def build_encoder(config: Config) -> PromptEncoder:
    """The checkpoint's processor with the config's system prompt and image bounds."""
    return PromptEncoder(
        config.model.path,
        system_prompt=config.data.system_prompt,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )


def build_engine(
    config: Config, derived: Derived, encoder: PromptEncoder, topology: Topology, records: Sequence[Record]
) -> RolloutEngine:
    """The rollout engine of `rollout.engine`; third-party engines are imported only when they are chosen."""
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
            max_images=max(len(record.images) for record in records),
        )
    from perl_megatron.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(
        config.rollout, encoder=encoder, model_path=config.model.path, dtype=getattr(torch, config.model.dtype)
    )


def build_collector(
    config: Config, records: Sequence[Record], sampler: ShuffledSampler, encoder: PromptEncoder, engine: RolloutEngine
) -> GroupCollector | AheadCollector:
    """Collects a step's groups, or with `rollout.max_staleness` also the next one's during the update."""
    collector = GroupCollector(config, records, sampler, encoder, engine)
    if config.rollout.max_staleness == 0:
        return collector
    run, permutation = config.run, config.permutation
    return AheadCollector(
        collector,
        cast(ServerEngine, engine),  # `derive` has refused others
        lambda step: swap_probability(permutation, step, run.steps),
        num_steps=run.steps,
        timeout_seconds=run.collective_timeout,
    )


def read_questions(config: Config, path: Path | None, key: str, encoder: PromptEncoder) -> tuple[Record, ...]:
    """The good records of a file; those with too long a prompt are dropped, and all dropped ones are named.

    Raises:
        UserError: the file is not set, has too many corrupt records, or none is left.
    """
    if path is None:
        raise UserError(f"{key} has to be set", where=key, fix=f"{key}=FILE.jsonl")
    dataset = read_records(path, max_corrupt_fraction=config.data.max_corrupt_fraction)
    dataset = drop_unusable(dataset, config.data.max_prompt_tokens, encoder)
    for dropped in dataset.dropped:
        logger.warning("dropped %s", dropped)
    logger.info("%s: %d records, %d dropped", path, len(dataset.records), len(dataset.dropped))
    if not dataset.records:
        raise UserError(f"no record is left of {path}", where=key, fix="see the reasons above")
    return dataset.records


def drop_unusable(dataset: Dataset, max_prompt_tokens: int, encoder: PromptEncoder) -> Dataset:
    """Without the records that could not be asked or graded.

    These are the ones with an answer that cannot be read as its answer type, and those whose prompt in the original
    order has more than ``max_prompt_tokens`` tokens or holds a special token.
    """
    kept, dropped = [], list(dataset.dropped)
    for record in dataset.records:
        try:
            check_expected(
                record.answer,
                record.answer_type,
                where=record.source,
                grading=record.grading,
                option_slots=record.contract.option_slots,
                num_images=len(record.images),
            )
            num_tokens = len(encoder.encode(apply_order(record, range(len(record.images)), 0)).token_ids)
        except UserError as error:
            dropped.append(DroppedRecord(record.source, record.id, error.what))
            continue
        if num_tokens <= max_prompt_tokens:
            kept.append(record)
        else:
            reason = f"its prompt has {num_tokens} tokens, more than data.max_prompt_tokens = {max_prompt_tokens}"
            dropped.append(DroppedRecord(record.source, record.id, reason))
    return replace(dataset, records=tuple(kept), dropped=tuple(dropped))
