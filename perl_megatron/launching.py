"""`perl-megatron launch`: the same run on several machines, by torchrun or as a Slurm job. Needs no torch itself."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from perl_megatron.config.derive_launch import (
    check_node_rank,
    check_slurm,
    endpoint_of,
    processes_per_node,
    with_servers,
)
from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import LoadedConfig, load_config, save_resolved
from perl_megatron.config.preset_source import preset_names
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.launch import slurm, slurm_queue, torchrun
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.runtime.addresses import address_towards

Check = Callable[[LoadedConfig, argparse.Namespace, int], None]
"""Checks a config for a command (with its options ``command`` and ``resume``) on so many processes."""


def add_launch(commands: argparse._SubParsersAction, check: Check) -> None:
    """The options of `launch`."""
    description = "train, sft or eval on several machines: by torchrun (start it on each), or as a Slurm job"
    launch = commands.add_parser("launch", help=description, description=description)
    launch.set_defaults(handler=partial(run_launch, check=check))
    launch.add_argument("way", choices=("torchrun", "slurm"))
    launch.add_argument("config", type=Path, help="YAML file; its section `launch` says on which machines")
    launch.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    text = f"published settings, below the file's own; several: later ones win ({', '.join(preset_names())})"
    launch.add_argument("--preset", action="append", default=[], metavar="NAME", help=text)
    launch.add_argument("--job", choices=("train", "sft", "eval"), default="train", help="what runs (default: train)")
    launch.add_argument("--resume", action="store_true", help="continue from the last good checkpoint")
    launch.add_argument("--dry-run", action="store_true", help="print what would run, and leave nothing behind")
    text = "torchrun: which machine this is, from 0 (default: what Slurm says, or 0 of 1)"
    launch.add_argument("--node-rank", type=int, metavar="N", help=text)
    text = "torchrun: keep the logs here from the start (default: in the run's folder, when there is one)"
    launch.add_argument("--logs", type=Path, metavar="FOLDER", help=text)
    text = "torchrun: stop the run, as by SIGUSR1, when this file appears"
    launch.add_argument("--stop-file", type=Path, metavar="FILE", help=text)


def run_launch(options: argparse.Namespace, argv: list[str], *, check: Check) -> int:
    """Start the run, or print what would be started; returns the exit status."""
    if options.job == "eval" and options.resume:
        raise UserError("an evaluation is not resumed", where="--resume --job eval", fix="leave --resume out")
    loaded = load_config(options.config, options.overrides)
    evaluation, processes = loaded.config.evaluation, launched_processes(loaded.config)
    if options.job == "eval" and evaluation.ask == "endpoint" and processes > 1:
        raise UserError(
            f"{processes} processes would ask the endpoint for the same",
            where="evaluation.ask = endpoint, parallel",
            fix="use `perl-megatron eval`, or leave parallel.* at 1",
        )
    return _run_torchrun(options, loaded, check) if options.way == "torchrun" else _run_slurm(options, loaded, check)


def _run_torchrun(options: argparse.Namespace, loaded: LoadedConfig, check: Check) -> int:
    config = loaded.config
    here, rendezvous = processes_per_node(config), _rendezvous(config, options.node_rank)
    if rendezvous is None or rendezvous.node_rank in (0, None):  # the first machine may have made the folder meanwhile
        check(loaded, _job(options), here * config.launch.nodes)
    arguments = [options.job, str(options.config), *options.overrides, *(["--resume"] if options.resume else [])]
    logs = options.logs
    if logs is not None and rendezvous is not None:
        logs /= f"node-{rendezvous.local_address if rendezvous.node_rank is None else rendezvous.node_rank}"
    if options.dry_run:
        place = logs or RunFolder.of(config).logs
        print(shlex.join(torchrun.torchrun_command([*torchrun.PROGRAM, *arguments], here, place, rendezvous)))
        return 0
    return torchrun.launch(
        arguments,
        num_processes=here,
        log_dir=RunFolder.of(config).logs,
        logs=logs,
        rendezvous=rendezvous,
        stop_file=options.stop_file,
    )


def _rendezvous(config: Config, node_rank: int | None) -> torchrun.Rendezvous | None:
    """With the other machines, if there are any."""
    launch = config.launch
    if launch.nodes == 1:
        if node_rank is not None:
            check_node_rank(launch, node_rank)
        return None
    host, port = endpoint_of(launch)
    if launch.rendezvous == "static" and node_rank is None:
        node_rank = torchrun.slurm_node_rank()
    check_node_rank(launch, node_rank)
    try:
        address = address_towards(host)
    except OSError as error:
        fix = "set it to an address of the first machine that this one reaches"
        where = f"launch.endpoint = {launch.endpoint}"
        raise UserError(f"there is no way to {host}: {error.strerror}", where=where, fix=fix) from error
    return torchrun.Rendezvous(
        num_nodes=launch.nodes,
        node_rank=node_rank,
        backend=launch.rendezvous,
        host=host,
        port=port,
        local_address=address,
        job=config.run.name,
        timeout_seconds=launch.rendezvous_timeout,
    )


def _run_slurm(options: argparse.Namespace, loaded: LoadedConfig, check: Check) -> int:
    config = loaded.config
    for name in ("node_rank", "logs", "stop_file"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"a Slurm job sets {option} itself", where=option, fix="leave it out")
    check_slurm(config, options.job)
    files = slurm.JobFiles.of(config)
    as_in_job = replace(loaded, config=with_servers(config, options.job))
    check(as_in_job, _job(options), processes_per_node(config) * config.launch.nodes)
    if options.dry_run:
        print(slurm.render(config, files, command=options.job, resume=options.resume), end="")
        return 0
    slurm_queue.require_slurm()
    try:
        how = {"command": options.job, "sbatch_options": config.launch.sbatch_options}
        is_behind = slurm_queue.check_alone(files, config.run.name, **how)
        files.root.mkdir(parents=True, exist_ok=True)
        save_resolved(loaded, files.config)
        if config.launch.rollout_nodes and config.rollout.api_key_file is None:
            slurm_queue.write_key(files.key)
        script = slurm.render(config, files, command=options.job, resume=options.resume, is_behind=is_behind)
        number = slurm_queue.submit(files, script)
    except OSError as error:
        raise UserError(f"the job's files cannot be written: {error}", where=str(files.root)) from error
    print(f"job {number}: {files.root}/job-{number}.log")
    return 0


def _job(options: argparse.Namespace) -> argparse.Namespace:
    """The options of the command that runs in the job."""
    return argparse.Namespace(command=options.job, resume=options.resume)
