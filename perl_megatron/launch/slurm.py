"""A Slurm job of a run: its batch script, and how it is submitted.

The script is made of fixed text and of values that are quoted (``shlex.quote``); what stands in the lines `#SBATCH`,
which no shell reads, was checked by ``config/derive_launch.py``.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.config.derive_launch import servers_per_node, signal_seconds
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.launch.failures import EXIT_STOPPED
from perl_megatron.launch.slurm_script import BODY, SERVERS, SERVERS_END

FIRST_PORT, NUM_PORTS = 20000, 10000
"""The machines of a job meet at a port that follows from its number, so that jobs on one machine do not collide."""


@dataclass(frozen=True)
class JobFiles:
    """What a job needs and leaves, beside the run's folder, which a new run makes itself."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> JobFiles:
        """Of this config's run; nothing is created."""
        return cls(config.run.directory / f"{config.run.name}.slurm")

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.root / "job.sbatch"

    @property
    def config(self) -> Path:
        """The resolved config as it was submitted: what is edited later does not change a job that waits."""
        return self.root / "config.yaml"

    @property
    def key(self) -> Path:
        """The key of the rollout servers."""
        return self.root / "api_key"


def render(config: Config, files: JobFiles, *, command: str, resume: bool) -> str:
    """The batch script. ``command``: train, sft or eval."""
    launch = config.launch
    with_servers = launch.rollout_nodes > 0
    key = config.rollout.api_key_file or files.key
    values: dict[str, str | Path | Sequence[str]] = {
        "python": _python(config),
        "srun_options": _srun_options(config),
        "files": files.root,
        "run": config.run.directory / config.run.name,
        "command": command,
        "trainer_nodes": str(launch.nodes),
        "first_port": str(FIRST_PORT),
        "num_ports": str(NUM_PORTS),
        "stopped_status": str(EXIT_STOPPED),
        "requeue": "1" if launch.requeue else "",
        "resume": ["--resume"] if resume else [],
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


def require_slurm() -> None:
    """UserError where jobs cannot be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "Slurm's `sbatch` is not here",
            where="PATH",
            fix="submit from a login node of the cluster, or look at the script with --dry-run",
        )


def submit(files: JobFiles) -> int:
    """Submit the script; the job's number. UserError with Slurm's words where it is refused."""
    result = subprocess.run(["sbatch", "--parsable", str(files.script)], capture_output=True, text=True, check=False)
    number = result.stdout.strip().partition(";")[0]
    if result.returncode != 0 or not number.isdecimal():
        raise UserError(
            f"Slurm refused the job: {result.stderr.strip() or result.stdout.strip()}",
            where=str(files.script),
            fix="change launch.partition, account, qos, time, nodes, gpus_per_node or sbatch_options",
        )
    return int(number)


def write_key(file: Path) -> None:
    """A new key of the rollout servers, for this user's eyes only; one that is there stays."""
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe() + "\n", encoding="ascii")


def _python(config: Config) -> list[str]:
    """How the package's Python is called in the job, container included."""
    launch = config.launch
    python = launch.python or (sys.executable if launch.container == "none" else "python")
    if launch.container != "apptainer":
        return [python]
    mounts = [part for mount in launch.container_mounts for part in ("--bind", mount)]
    gpu = ["--nv"] if launch.gpus_per_node else []
    here = str(Path.cwd())
    return ["apptainer", "exec", *gpu, "--bind", here, *mounts, "--pwd", here, launch.container_image, python]


def _srun_options(config: Config) -> list[str]:
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
