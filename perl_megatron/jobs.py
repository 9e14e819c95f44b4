"""One process of a job: from the process group to the last log line."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

from rich.console import Console

from perl_megatron import evaluation_job
from perl_megatron.build import build_supervised, build_training
from perl_megatron.config.load import LoadedConfig
from perl_megatron.launch.torchrun import launcher_pid
from perl_megatron.loop import supervise, train
from perl_megatron.observability.full_disk import FullDisk
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.observability.summary import read_summary, summary_table
from perl_megatron.runtime import garbage, platform, topology
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.session import Session


def run(command: str, loaded: LoadedConfig, *, resume: bool) -> int:
    """Be one process of `train`, `sft` or `eval`; returns the exit status."""
    config = loaded.config
    if command == "eval" and config.evaluation.ask == "endpoint":
        return evaluation_job.by_endpoint(config)
    memory = PeakMemory(launcher_pid() or os.getpid()) if platform.rank_and_world_size()[0] == 0 else None
    timeout = config.deadlines.collective_timeout
    place = topology.initialize(config.parallel, seed=config.run.seed, timeout_seconds=timeout)
    platform.set_threads()
    with topology.left_at_the_end():
        watchdog = Watchdog(config.deadlines.of_phases(), rank=place.rank, world_size=place.world_size)
        with watchdog, StopRequest(last=True) as stop:
            if command == "eval":
                return evaluation_job.by_engine(config, place, watchdog=watchdog, stop=stop)
            session = _run_session(command, loaded, place, resume=resume, stop=stop, memory=memory, watchdog=watchdog)
        if place.rank == 0:
            with FullDisk().tolerated("lines of the summary"):  # all is done, and on another disk maybe
                _say_where_to_look(session)
        return session.exit_status


def _run_session(
    command: str,
    loaded: LoadedConfig,
    place: topology.Topology,
    *,
    resume: bool,
    stop: StopRequest,
    memory: PeakMemory | None,
    watchdog: Watchdog,
) -> Session:
    how: dict[str, Any] = {"resume": resume, "stop": stop, "memory": memory, "watchdog": watchdog}
    if command == "sft":
        with watchdog.phase("start"):
            supervised = build_supervised(loaded, place, **how)
        garbage.stay()
        with closing(supervised):
            supervise(supervised)
        return supervised
    with watchdog.phase("start"):
        training = build_training(loaded, place, **how)
    garbage.stay()
    with closing(training):
        train(training)
    return training


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
