"""What the section `launch` has to be, for torchrun on several machines and for a Slurm job."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from perl_megatron.config.launch_section import LaunchConfig
from perl_megatron.config.layout import launched_processes, processes_of_a_replica
from perl_megatron.config.schema import Config
from perl_megatron.config.sweep_sections import ArraySection
from perl_megatron.errors import UserError

SIGNAL_MARGIN = 30
"""Seconds of a Slurm job after the grace period, for processes to end; Slurm's own clock is no finer."""

_WORD = re.compile(r"[A-Za-z0-9_.,:@+/=-]+")
"""What may stand in a line `#SBATCH`, which Slurm reads by rules of its own."""
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:@+/=*\[\]&|()%-]+)?")
_RELIED_ON = frozenset(
    (
        *("--job-name", "--output", "--error", "--open-mode", "--signal", "--requeue", "--no-requeue", "--nodes"),
        *("--ntasks", "--ntasks-per-node", "--array", "--chdir", "--wrap", "--wait", "--test-only", "--clusters"),
    )
)
"""Options of sbatch that a script of ours has, or whose absence it relies on."""
_WITH_FIELD = frozenset(("--partition", "--account", "--qos", "--time", "--gpus-per-node", "--cpus-per-task"))
"""Options of sbatch that the section `launch` has fields for."""
_OF_AN_ARRAY = frozenset(("--ntasks-per-core", "--ntasks-per-gpu", "--ntasks-per-socket"))
"""Further ones that change how many tasks there are, where a sweep has one for each worker."""
_WHOLE = frozenset(("--gpus",))
"""Options that are the beginning of a longer one, and no abbreviation of it."""
_READONLY = frozenset(("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"))
"""Variables that bash does not let anybody set."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def processes_per_node(config: Config, processes: int | None = None) -> int:
    """Processes of the run on each of `launch.nodes` machines; UserError where they are not equally many.

    ``processes``: of the run, where they are given elsewhere; None: those of the layout.
    """
    parallel, nodes = config.parallel, config.launch.nodes
    is_unsaid = nodes > 1 and parallel.data is None and processes is None
    number = launched_processes(config) if processes is None else processes
    if number % nodes or is_unsaid:
        sizes = f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × context {parallel.context}"
        data = number // processes_of_a_replica(parallel)
        fix = "set parallel.data so that the product of all sizes is the number of processes on all machines"
        raise UserError(
            f"{number} processes (data {data} × {sizes}) do not go evenly on {nodes} machines"
            if number % nodes
            else f"it is not said how many processes there are on {nodes} machines",
            where=f"launch.nodes = {nodes}, parallel.data = {parallel.data}",
            fix=fix if is_unsaid else f"{_nodes_for(config.launch, number)}, or {fix}",
        )
    return number // nodes


def check_nodes(config: Config) -> int:
    """Processes of the layout on each machine, one for each GPU of `launch.gpus_per_node` where that is set.

    UserError where they are not equally many, or not as many as GPUs.
    """
    launch, here = config.launch, processes_per_node(config)
    if launch.gpus_per_node not in (0, here):
        raise UserError(
            f"{launch.nodes} × {launch.gpus_per_node} GPUs are not the {here * launch.nodes} processes of the layout, "
            "one for each GPU",
            where=f"launch.nodes = {launch.nodes}, launch.gpus_per_node = {launch.gpus_per_node}, parallel",
            fix=f"{_nodes_for(launch, here * launch.nodes)}, or change launch.gpus_per_node or parallel.data",
        )
    return here


def _nodes_for(launch: LaunchConfig, processes: int) -> str:
    """How so many processes fill machines, as a remedy: those of the size that is set, where that goes."""
    if not launch.gpus_per_node:
        return f"make launch.nodes a divisor of {processes}"
    here = filled_node(processes, launch.gpus_per_node)
    size = "" if here == launch.gpus_per_node else f" launch.gpus_per_node={here}"
    return f"set launch.nodes={processes // here}{size}"


def filled_node(processes: int, size: int) -> int:
    """The most processes, up to ``size``, that all machines can have when each has as many."""
    return max(here for here in range(1, min(processes, size) + 1) if processes % here == 0)


def endpoint_of(launch: LaunchConfig) -> tuple[str, int]:
    """Host and port of `launch.endpoint`."""
    host, _, port = launch.endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", host) or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UserError(
            f"{launch.endpoint!r} is not the place of a machine" if launch.endpoint else "no place is set to meet at",
            where=f"launch.endpoint, launch.nodes = {launch.nodes}",
            fix="set launch.endpoint=HOST:PORT, the first machine's address and a free port of it, on all machines",
        )
    return host, int(port)


def check_node_rank(launch: LaunchConfig, node_rank: int | None) -> None:
    """UserError where this machine's rank is missing, wrong, or not asked for."""
    if launch.rendezvous == "c10d":
        if node_rank is not None:
            raise UserError(
                "c10d gives out the ranks itself",
                where=f"--node-rank {node_rank}, launch.rendezvous = c10d",
                fix="leave --node-rank out, or set launch.rendezvous=static",
            )
    elif node_rank is None or not 0 <= node_rank < launch.nodes:
        raise UserError(
            f"{'no rank' if node_rank is None else f'{node_rank} is not the rank'} of one of {launch.nodes} machines",
            where="--node-rank, launch.nodes, launch.rendezvous = static",
            fix=f"start it on each machine with another --node-rank from 0 to {launch.nodes - 1}, or set "
            "launch.rendezvous=c10d",
        )


def check_slurm(config: Config, command: str) -> None:
    """UserError where no Slurm job could be made of the section for `train`, `sft` or `eval`; Slurm is not asked."""
    launch = config.launch
    check_nodes(config)
    for name in ("partition", "account", "qos"):
        value = getattr(launch, name)
        if value and not _WORD.fullmatch(value):
            _refuse(f"{value!r} is no name of Slurm's", f"launch.{name}", "write letters, digits and _.,:@+/=- only")
    _check_options(launch.sbatch_options, _RELIED_ON | _WITH_FIELD, "`launch slurm`", "launch.sbatch_options")
    _check_log_folder(config.run.directory, "run.directory")
    _check_time(launch)
    _check_environment(launch)
    _check_container(launch)
    _check_rollout_nodes(config, command)


def check_array(slurm: ArraySection, folder: Path, places: Mapping[str, str]) -> None:
    """UserError where no job array of workers could be made of a sweep's section `slurm`; Slurm is not asked.

    ``folder``: the sweep's, where the logs are; ``places``: where each setting comes from.
    """
    where = f"{places['slurm.options']}: slurm.options"
    _check_options(slurm.options, _RELIED_ON | _OF_AN_ARRAY, "`sweep --slurm`", where)
    _check_log_folder(folder.resolve(), f"{places['sweep.directory']}: sweep.directory")
    _check_script(slurm.setup, f"{places['slurm.setup']}: slurm.setup")


def signal_seconds(launch: LaunchConfig) -> int:
    """How long before the end of its time a Slurm job is told."""
    return math.ceil(launch.grace_seconds) + SIGNAL_MARGIN


def servers_per_node(config: Config) -> int:
    """Rollout servers on each rollout machine: each has the GPUs that it is spread over; without GPUs there is one."""
    return max(1, config.launch.gpus_per_node // (config.rollout.tensor_parallel or 1))


def with_servers(config: Config, command: str = "train") -> Config:
    """The config as the processes of a Slurm job have it: with the servers that run on `launch.rollout_nodes` machines.

    Their addresses stand for those that are known when the job begins. UserError where there cannot be such servers.
    """
    launch = config.launch
    if not launch.rollout_nodes:
        return config
    _check_rollout_nodes(config, command)
    servers = tuple(
        f"http://rollout-node-{node}:{launch.server_port + number}"
        for node in range(launch.rollout_nodes)
        for number in range(servers_per_node(config))
    )
    rollout = config.rollout.model_copy(update={"engine": "server", "servers": servers})
    return config.model_copy(update={"rollout": rollout})


def _check_time(launch: LaunchConfig) -> None:
    if not launch.time:
        return
    found = _TIME.fullmatch(launch.time)
    if found is None:
        _refuse(f"{launch.time!r} is no time limit of Slurm's", "launch.time", "write minutes, H:M:S, D-H or D-H:M:S")
    assert found is not None
    numbers = [int(part) for part in found["clock"].split(":")]
    if found["days"] is not None:  # D-H[:M[:S]]
        seconds = ((int(found["days"]) * 24 + numbers[0]) * 60 + sum(numbers[1:2])) * 60 + sum(numbers[2:3])
    else:  # M[:S] or H:M:S
        units = (60, 1) if len(numbers) < 3 else (3600, 60, 1)
        seconds = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    if seconds <= signal_seconds(launch):
        _refuse(
            f"a job of {seconds} s would be told to end as it begins, {signal_seconds(launch)} s before",
            f"launch.time = {launch.time}, launch.grace_seconds = {launch.grace_seconds:g}",
            "give it more time, or a shorter grace period",
        )


def _check_environment(launch: LaunchConfig) -> None:
    for assignment in launch.environment:
        name, equals, _ = assignment.partition("=")
        if not equals or not _NAME.fullmatch(name) or name in _READONLY:
            _refuse(f"{assignment!r} does not set a variable", "launch.environment", "write NAME=VALUE")
    _check_script(launch.setup_file, "launch.setup_file")


def _check_script(file: Path | None, where: str) -> None:
    if file is not None and not file.is_file():
        fix = f"paths are relative to the current directory, {Path.cwd()}"
        _refuse("the file does not exist", f"{where} = {file}", fix)


def _check_log_folder(folder: Path, where: str) -> None:
    if not str(folder).isprintable() or any(character in str(folder) for character in '"\\%'):
        fix = 'choose a folder without ", \\, % and line ends'
        _refuse(f"Slurm cannot write logs below {str(folder)!r}", where, fix)


def _check_options(options: Sequence[str], ours: Set[str], whose: str, where: str) -> None:
    """Refuse what sbatch would not read as one option, and the options that are ``ours``, abbreviations included."""
    for option in options:
        name = option.partition("=")[0]
        if not _OPTION.fullmatch(option):
            _refuse(f"{option!r} is no option of sbatch", where, "write --name or --name=value, without blanks")
        meant = [other for other in ours if other == name or (other.startswith(name) and name not in _WHOLE)]
        if meant:
            said = name if name in meant else f"{name}, which may stand for {min(meant)},"
            _refuse(f"{said} is left to {whose}", where, "leave it out; what can be chosen has a setting of its own")


def _check_container(launch: LaunchConfig) -> None:
    if (launch.container == "none") != (launch.container_image == ""):
        _refuse(
            "an image needs something that runs it" if launch.container_image else "there is no image to run",
            f"launch.container = {launch.container}, launch.container_image = {launch.container_image!r}",
            "set launch.container to pyxis or apptainer, and launch.container_image; or neither",
        )
    if launch.container_image.startswith("-"):
        fix = "write ./ before the name of a file"
        _refuse("it would be taken for an option", f"launch.container_image = {launch.container_image}", fix)
    if launch.container != "none" and any(character in str(Path.cwd()) for character in ",:"):
        fix = "submit from a folder without commas and colons in its path"
        _refuse(f"{Path.cwd()}, where the job runs, cannot be mounted", f"launch.container = {launch.container}", fix)
    if launch.container_mounts and launch.container == "none":
        _refuse("there is no container to mount it in", "launch.container_mounts", "set launch.container too")
    for mount in launch.container_mounts:
        if not mount.startswith("/") or "," in mount:
            fix = "write /path or /path:/path/inside, without commas"
            _refuse(f"{mount!r} cannot be mounted", "launch.container_mounts", fix)


def _check_rollout_nodes(config: Config, command: str) -> None:
    launch, rollout = config.launch, config.rollout
    if not launch.rollout_nodes:
        return
    if command == "sft" or (command == "eval" and config.evaluation.ask == "endpoint"):
        _refuse(
            "nobody would ask the servers of the job",
            f"launch.rollout_nodes = {launch.rollout_nodes}, --job {command}",
            "set launch.rollout_nodes=0 for this job",
        )
    if rollout.servers or rollout.engine not in ("auto", "server"):
        _refuse(
            "the job's rollout machines have the servers of the run",
            f"launch.rollout_nodes = {launch.rollout_nodes}, rollout.engine = {rollout.engine}, rollout.servers",
            "leave rollout.engine and rollout.servers out, or set launch.rollout_nodes=0",
        )
    size = rollout.tensor_parallel or 1
    if launch.gpus_per_node % size:
        _refuse(
            f"servers over {size} GPUs each do not use up {launch.gpus_per_node} GPUs",
            f"rollout.tensor_parallel = {rollout.tensor_parallel}, launch.gpus_per_node = {launch.gpus_per_node}",
            "make rollout.tensor_parallel a divisor of launch.gpus_per_node",
        )


def _refuse(what: str, where: str, fix: str) -> None:
    raise UserError(what, where=where, fix=fix)
