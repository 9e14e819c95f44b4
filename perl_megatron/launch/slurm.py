"""A Slurm job of a run: its batch script. ``launch/slurm_queue.py`` submits it.

The script is made of fixed text and of values that are quoted (``shlex.quote``); what stands in the lines `#SBATCH`,
which no shell reads, was checked by ``config/derive_launch.py``.
"""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.config.derive_launch import servers_per_node, signal_seconds
from perl_megatron.config.schema import Config
from perl_megatron.launch.failures import EXIT_STOPPED
from perl_megatron.launch.slurm_script import BODY, SERVERS, SERVERS_END

FIRST_PORT, NUM_PORTS = 20000, 10000
"""The machines of a job meet at a port that follows from its number, so that jobs on one machine do not collide."""


@dataclass(frozen=True)
class JobFiles:
    """What a job needs and leaves, beside the run's folder, which a new run makes itself."""

    root: Path
    token: str
    """Tells the files of this submission from those of others of the same run."""

    @classmethod
    def of(cls, config: Config) -> JobFiles:
        """Of one more submission of this config's run; nothing is created."""
        return cls(config.run.directory / f"{config.run.name}.slurm", secrets.token_hex(4))

    @property
    def config(self) -> Path:
        """The resolved config as it was submitted: nothing that is done later changes a job that waits."""
        return self.root / f"config-{self.token}.yaml"

    @property
    def key(self) -> Path:
        """The key of the rollout servers, of all jobs of the run."""
        return self.root / "api_key"

    @property
    def draft(self) -> Path:
        """The batch script until Slurm has given the job its number."""
        return self.root / f"script-{self.token}.sbatch"

    def script(self, job: int) -> Path:
        """The batch script of a job that was submitted, for people; Slurm has its own copy."""
        return self.root / f"job-{job}.sbatch"


def render(config: Config, files: JobFiles, *, command: str, resume: bool, is_behind: bool = False) -> str:
    """The batch script. ``command``: train, sft or eval. ``is_behind``: the job waits for another one of its run."""
    launch = config.launch
    with_servers = launch.rollout_nodes > 0
    key = config.rollout.api_key_file or files.key
    values: dict[str, str | Path | Sequence[str]] = {
        "python": python_words(config),
        "srun_options": srun_options(config),
        "files": files.root,
        "config": files.config,
        "run": config.run.directory / config.run.name,
        "command": command,
        "trainer_nodes": str(launch.nodes),
        "first_port": str(FIRST_PORT),
        "num_ports": str(NUM_PORTS),
        "stopped_status": str(EXIT_STOPPED),
        "requeue": "1" if launch.requeue else "",
        "resume": ["--resume"] if resume else [],
        "behind": "1" if is_behind else "",
    }
    if with_servers:
        values |= {
            "rollout_nodes": str(launch.rollout_nodes),
            "servers_per_node": str(servers_per_node(config)),
            "gpus_per_server": str((config.rollout.tensor_parallel or 1) if launch.gpus_per_node else 0),
            "server_port": str(launch.server_port),
            "api_key_file": key,
        }
    parts = [
        "#!/bin/bash",
        "# Made by `perl-megatron launch slurm`, anew at every launch: change the config rather than this file.",
        *(f"#SBATCH {option}" for option in sbatch_options(config, files)),
        "",
        *(f"export {_export(assignment)}" for assignment in launch.environment),
        # Before the rest: it may use names as the script does, and not all such files stand `set -u`.
        *([f". {shlex.quote(_as_path(launch.setup_file))}"] if launch.setup_file is not None else []),
        "set -uo pipefail",
        *(_assignment(name, value) for name, value in values.items()),
        BODY.format(servers=SERVERS if with_servers else "", servers_end=SERVERS_END if with_servers else "").rstrip(),
    ]
    return "\n".join(parts) + "\n"


def sbatch_options(config: Config, files: JobFiles) -> list[str]:
    """What stands behind `#SBATCH`."""
    launch = config.launch
    named = {"partition": launch.partition, "account": launch.account, "qos": launch.qos, "time": launch.time}
    return [
        f"--job-name={config.run.name}",
        f'--output="{files.root}/job-%j.log"',
        "--open-mode=append",
        f"--nodes={launch.nodes + launch.rollout_nodes}",
        "--ntasks-per-node=1",
        f"--signal=B:USR1@{signal_seconds(launch)}",
        "--requeue" if launch.requeue else "--no-requeue",
        *(f"--{name}={value}" for name, value in named.items() if value),
        *([f"--gpus-per-node={launch.gpus_per_node}"] if launch.gpus_per_node else []),
        *([f"--cpus-per-task={launch.cpus_per_node}"] if launch.cpus_per_node else []),
        *launch.sbatch_options,
    ]


def python_words(config: Config) -> list[str]:
    """How the package's Python is called in the job, container included."""
    launch = config.launch
    python = launch.python or (sys.executable if launch.container == "none" else "python")
    if launch.container != "apptainer":
        return [python]
    mounts = [part for mount in launch.container_mounts for part in ("--bind", mount)]
    gpu = ["--nv"] if launch.gpus_per_node else []
    here = str(Path.cwd())
    return ["apptainer", "exec", *gpu, "--bind", here, *mounts, "--pwd", here, launch.container_image, python]


def srun_options(config: Config) -> list[str]:
    """What each step of the job needs of the section: cores and, with pyxis, the container."""
    launch = config.launch
    # Since Slurm 22.05 srun does not take it from the job.
    options = [f"--cpus-per-task={launch.cpus_per_node}"] if launch.cpus_per_node else []
    if launch.container == "pyxis":
        here = str(Path.cwd())
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in (here, *launch.container_mounts)]
        options += [f"--container-image={launch.container_image}", f"--container-mounts={','.join(mounts)}"]
        options += [f"--container-workdir={here}"]
    return options


def _assignment(name: str, value: str | Path | Sequence[str]) -> str:
    if isinstance(value, str | Path):
        return f"{name}={shlex.quote(_as_path(value) if isinstance(value, Path) else value)}"
    return f"{name}=({' '.join(map(shlex.quote, value))})"


def _as_path(path: Path) -> str:
    """So that no command takes it for an option, and `.` does not look for it in PATH."""
    return str(path) if path.is_absolute() else f"./{path}"


def _export(assignment: str) -> str:
    name, _, value = assignment.partition("=")
    return f"{name}={shlex.quote(value)}"
