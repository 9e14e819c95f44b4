"""One process of a job: from the process group to the last log line."""

from __future__ import annotations

import os
from contextlib import closing

from rich.console import Console

from perl_megatron.build import (
    build_encoder,
    build_engine,
    build_supervised,
    build_training,
    derive_for,
)
from perl_megatron.config.load import LoadedConfig
from perl_megatron.config.schema import PermutationConfig
from perl_megatron.evaluation.evaluate import evaluate
from perl_megatron.launch.torchrun import launcher_pid
from perl_megatron.loop import supervise, train
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.observability.summary import read_summary, summary_table
from perl_megatron.questions import most_images, read_questions
from perl_megatron.runtime import garbage, platform, topology
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.session import Session


def run(command: str, loaded: LoadedConfig, *, resume: bool) -> int:
    """Be one process of `train`, `sft` or `eval`; returns the exit status."""
    config = loaded.config
    memory = PeakMemory(launcher_pid() or os.getpid()) if platform.rank_and_world_size()[0] == 0 else None
    place = topology.initialize(config.parallel, seed=config.run.seed, timeout_seconds=config.run.collective_timeout)
    platform.set_threads()
    try:
        if command == "eval":
            return _evaluate(loaded, place)
        with StopRequest() as stop:
            session = _run_session(command, loaded, place, resume=resume, stop=stop, memory=memory)
        if place.rank == 0:
            _say_where_to_look(session)
        return session.exit_status
    finally:
        topology.shutdown()


def _run_session(
    command: str,
    loaded: LoadedConfig,
    place: topology.Topology,
    *,
    resume: bool,
    stop: StopRequest,
    memory: PeakMemory | None,
) -> Session:
    if command == "sft":
        supervised = build_supervised(loaded, place, resume=resume, stop=stop, memory=memory)
        garbage.stay()
        with closing(supervised):
            supervise(supervised)
        return supervised
    training = build_training(loaded, place, resume=resume, stop=stop, memory=memory)
    garbage.stay()
    with closing(training):
        train(training)
    return training


def _evaluate(loaded: LoadedConfig, place: topology.Topology) -> int:
    """Print held-out accuracy and flip rate of `model.path`, and write all outputs beside the run's folder.

    An earlier evaluation under the same `run.name` is replaced.
    """
    config = loaded.config
    derived = derive_for(config, place.world_size, "eval")
    encoder = build_encoder(config)
    records = read_questions(config, config.data.evaluation, "data.evaluation", encoder)
    engine = build_engine(config, derived, encoder, place, most_images(records, PermutationConfig()))
    try:
        result = evaluate(config, records, encoder, engine)
    finally:
        engine.close()
    if place.rank == 0:
        target = config.run.directory / f"{config.run.name}.evaluation.jsonl"
        result.write(target)
        console = Console()
        console.print(result.table(title=f"{config.model.path}, {engine.name} engine"))
        console.print(f"all answers: {target}")
    return 0


def _say_where_to_look(session: Session) -> None:
    console = Console(width=120)
    folder = session.folder
    if folder.summary.is_file():
        console.print(summary_table(read_summary(folder.summary), title=f"{folder.root}"))
        console.print(f"report:      {folder.report}")
    console.print(f"curves:      tensorboard --logdir {folder.tensorboard}")
    console.print(f"checkpoints: {folder.checkpoints}")
    if folder.export.is_dir():
        console.print(f"policy:      {folder.export}  (a Hugging Face folder: transformers and vLLM load it)")
