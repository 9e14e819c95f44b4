"""Start one process for each rank of this machine through torchrun, watch them, and leave none behind."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.config.layout import launched_processes
from perl_megatron.config.schema import Config
from perl_megatron.errors import is_full_disk
from perl_megatron.launch.conclusion import conclude
from perl_megatron.launch.failures import DIRECTORY_VARIABLE, EXIT_USER_ERROR
from perl_megatron.launch.ports import HOST, free_port, require_free_port
from perl_megatron.launch.supervise import Supervisor, die_with_parent

LAUNCHER_VARIABLE = "PERL_MEGATRON_LAUNCHER"
PROGRAM = ("-m", "perl_megatron")


def under_torchrun() -> bool:
    """Whether this process is one rank of a job that somebody (we, torchrun, Slurm) has started."""
    return "RANK" in os.environ


def needs_launch(config: Config) -> bool:
    """Whether the command has to start ranks itself: it is not a rank, and the layout asks for more than one."""
    return not under_torchrun() and launched_processes(config) > 1


def num_started_processes() -> int:
    """In a rank: the number of processes of the job, as torchrun sets it; 1 for a process started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_pid() -> int | None:
    """In a rank that `launch` started: the launcher's process id (all ranks are below it). Else None."""
    value = os.environ.get(LAUNCHER_VARIABLE)
    return int(value) if value is not None else None


def slurm_node_rank() -> int | None:
    """Which machine of a Slurm job step this is; None outside of one."""
    value = os.environ.get("SLURM_NODEID")
    return int(value) if value is not None else None


@dataclass(frozen=True)
class Rendezvous:
    """How the torchruns of several machines become one job."""

    num_nodes: int
    node_rank: int | None
    """Which machine this is; None with 'c10d', which gives out the ranks."""
    backend: str
    """'static' or 'c10d'."""
    host: str
    """Of the first machine."""
    port: int
    local_address: str
    """This machine's address as the others see it."""
    job: str
    """A name that no other job has that meets at the same place."""
    timeout_seconds: float
    """In which all machines have to be there."""


def launch(
    argv: Sequence[str],
    *,
    num_processes: int,
    log_dir: Path | None = None,
    logs: Path | None = None,
    rendezvous: Rendezvous | None = None,
    master_port: int | None = None,
    stop_file: Path | None = None,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Run `perl-megatron ARGV…` (or another program) as `num_processes` ranks here; returns the exit code.

    The first rank's output is on the console; every rank's is kept. Logs are in a temporary folder until the folder
    that holds `log_dir` exists (a refused run leaves no folder), then in `log_dir/TIME`; or from the start in `logs`.
    The first SIGINT, SIGTERM or SIGUSR1 is passed to the ranks, once, which end after their step or keep what they
    have; so is SIGUSR1 when `stop_file` appears. A second SIGINT ends everything at once. Ends with what `conclude`
    tells of the end, and returns its exit code.

    Args:
        rendezvous: with the other machines of the job; None: there are none.
        master_port: of a job of one machine; None: a free one.

    Raises:
        UserError: `master_port` cannot be used.
    """
    if master_port is not None:
        require_free_port(master_port)
    staging = logs or Path(tempfile.mkdtemp(prefix="perl-megatron-logs-"))
    failures = staging / "failures"
    shutil.rmtree(failures, ignore_errors=True)  # of an earlier launch with the same `logs`
    failures.mkdir(parents=True)
    with (staging / "torchrun.log").open("wb") as agent_log:
        agent = subprocess.Popen(
            torchrun_command([*program, *argv], num_processes, staging, rendezvous, master_port),
            env=_environment(failures),
            stdout=agent_log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the ranks through the supervisor only: torchrun would kill them half a minute later.
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - only a system call, no lock is taken
        )
        final = _Logs(staging, None if logs else log_dir, rendezvous)
        supervisor = Supervisor(agent, first_rank_logs=staging, on_tick=final.link)
        if stop_file is not None:
            supervisor.watch_for(stop_file)
        code = supervisor.wait()
    place = final.settle()
    run = None if log_dir is None else log_dir.parent
    status = conclude(code, place, ended_at_once=supervisor.ended_at_once, asked_by=supervisor.asked_by, run=run)
    began = run is not None and run.is_dir()  # its logs may lie here still, where its disk is full
    if place == staging and logs is None and status in (0, EXIT_USER_ERROR) and not began:
        shutil.rmtree(staging)  # no run began, and nothing is left to find out
    return status


class _Logs:
    """Temporary folder → the run's folder, as soon as there is one."""

    def __init__(self, staging: Path, log_dir: Path | None, rendezvous: Rendezvous | None):
        self._staging = staging
        name = time.strftime("%Y%m%d-%H%M%S")
        if rendezvous is not None:  # the machines begin in the same second
            unnamed = f"{rendezvous.local_address}-{os.getpid()}"
            name += f"-node-{unnamed if rendezvous.node_rank is None else rendezvous.node_rank}"
        self._final = None if log_dir is None else log_dir / name

    def link(self) -> None:
        """Show the logs in the run's folder while the run goes."""
        if self._final is not None and not self._final.is_symlink() and self._final.parent.parent.is_dir():
            try:
                self._final.parent.mkdir(exist_ok=True)
                self._final.symlink_to(self._staging)
            except OSError as error:
                if not is_full_disk(error):  # else it is tried again: the ranks do without it
                    raise

    def settle(self) -> Path:
        """Move the logs to where they stay; returns the place."""
        self.link()
        if self._final is None or not self._final.is_symlink():
            return self._staging
        part = self._final.with_name(f"{self._final.name}.part")
        try:
            shutil.copytree(self._staging, part)
            self._final.unlink()
            part.rename(self._final)
        except OSError:  # a full disk: how the job ended is still told
            shutil.rmtree(part, ignore_errors=True)
            self.link()
            return self._staging
        shutil.rmtree(self._staging, ignore_errors=True)
        return self._final


def torchrun_command(
    program: Sequence[str],
    num_processes: int,
    logs: Path,
    rendezvous: Rendezvous | None = None,
    master_port: int | None = None,
) -> list[str]:
    """torchrun on this machine, as an argument array."""
    return [
        *(sys.executable, "-m", "perl_megatron.launch.agent"),
        *("--nnodes", str(rendezvous.num_nodes if rendezvous else 1), "--nproc-per-node", str(num_processes)),
        *_rendezvous_options(rendezvous, master_port),
        *("--log-dir", str(logs), "--redirects", "3"),
        *program,
    ]


def _rendezvous_options(rendezvous: Rendezvous | None, master_port: int | None) -> list[str]:
    if rendezvous is None:
        port = master_port if master_port is not None else free_port()
        return ["--rdzv-backend", "static", "--master-addr", HOST, "--master-port", str(port)]
    host, port = rendezvous.host, rendezvous.port
    seconds = math.ceil(rendezvous.timeout_seconds)
    common = ["--rdzv-backend", rendezvous.backend, "--rdzv-id", rendezvous.job]
    if rendezvous.backend == "static":
        place = ["--master-addr", host, "--master-port", str(port), "--node-rank", str(rendezvous.node_rank)]
        return [*common, *place, "--rdzv-conf", f"timeout={seconds}"]
    place = ["--rdzv-endpoint", f"{host}:{port}", "--local-addr", rendezvous.local_address]
    return [*common, *place, "--rdzv-conf", f"join_timeout={seconds}"]


def _environment(failures: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        DIRECTORY_VARIABLE: str(failures),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
