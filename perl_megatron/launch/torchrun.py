"""Start one process for each rank of this machine through torchrun, watch them, and leave none behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from perl_megatron.config.layout import launched_processes
from perl_megatron.config.schema import Config
from perl_megatron.launch.failures import (
    DIRECTORY_VARIABLE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    first_failure,
    was_stopped,
)
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


def launch(
    argv: Sequence[str],
    *,
    num_processes: int,
    log_dir: Path | None = None,
    master_port: int | None = None,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Run `perl-megatron ARGV…` (or another program) as `num_processes` ranks; returns the exit code.

    Rank 0's output is on the console; every rank's is kept. Logs are in a temporary folder until the folder that holds
    `log_dir` exists (a refused run leaves no folder), then in `log_dir/TIME`. The first SIGINT or SIGTERM
    is passed to the ranks, once, which end after their step; the second ends everything at once. Ends with the first
    failing rank's traceback. Exit code: 0; 75 for a run that was stopped by request; 2 for a user's mistake; 130 when
    ended at once; 1 for the rest.

    Raises UserError where `master_port` cannot be used.
    """
    if master_port is not None:
        require_free_port(master_port)
    staging = Path(tempfile.mkdtemp(prefix="perl-megatron-logs-"))
    failures = staging / "failures"
    failures.mkdir()
    with (staging / "torchrun.log").open("wb") as agent_log:
        agent = subprocess.Popen(
            _command([*program, *argv], num_processes, staging, master_port),
            env=_environment(failures),
            stdout=agent_log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the ranks through the supervisor only: torchrun would kill them half a minute later.
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - only a system call, no lock is taken
        )
        logs = _Logs(staging, log_dir)
        supervisor = Supervisor(agent, rank_zero_logs=staging, on_tick=logs.link)
        code = supervisor.wait()
    place = logs.settle()
    status = conclude(code, place, ended_at_once=supervisor.ended_at_once, asked_to_stop=supervisor.asked_to_stop)
    if place == staging and status in (0, EXIT_USER_ERROR):
        shutil.rmtree(staging)  # no run began, and nothing is left to find out
    return status


class _Logs:
    """Temporary folder → the run's folder, as soon as there is one."""

    def __init__(self, staging: Path, log_dir: Path | None):
        self._staging = staging
        self._final = None if log_dir is None else log_dir / time.strftime("%Y%m%d-%H%M%S")

    def link(self) -> None:
        """Show the logs in the run's folder while the run goes."""
        if self._final is not None and not self._final.is_symlink() and self._final.parent.parent.is_dir():
            self._final.parent.mkdir(exist_ok=True)
            self._final.symlink_to(self._staging)

    def settle(self) -> Path:
        """Move the logs to where they stay; returns the place."""
        self.link()
        if self._final is None or not self._final.is_symlink():
            return self._staging
        self._final.unlink()
        shutil.move(self._staging, self._final)
        return self._final


def conclude(code: int, logs: Path, *, ended_at_once: bool, asked_to_stop: bool = False) -> int:
    """Tell a person how the job ended, the first failure last; returns the exit code of `launch`."""
    if ended_at_once:
        print(f"ended at once; logs: {logs}", file=sys.stderr)
        return 130
    if code == 0:
        return EXIT_STOPPED if was_stopped(logs / "failures") else 0
    failure = first_failure(logs / "failures")
    if failure is not None and failure.user_error:
        print(f"error: {failure.text}", file=sys.stderr)
        return EXIT_USER_ERROR
    if failure is not None:
        print(f"\nrank {failure.rank} failed first:\n{failure.text}logs of all ranks: {logs}", file=sys.stderr)
    elif asked_to_stop:
        print(f"stopped before the first step; logs: {logs}", file=sys.stderr)
        return 130
    else:
        reason = "no rank said why: one was killed (out of memory?) or crashed"
        print(f"\n{reason}\nlogs of all ranks: {logs}; torchrun's account:", file=sys.stderr)
        print(_tail(logs / "torchrun.log"), file=sys.stderr)
    return EXIT_FAILURE


def _tail(path: Path, num_lines: int = 25) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def _command(program: Sequence[str], num_processes: int, logs: Path, master_port: int | None) -> list[str]:
    port = master_port if master_port is not None else free_port()
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(num_processes)),
        *("--rdzv-backend", "static", "--master-addr", HOST, "--master-port", str(port)),
        *("--log-dir", str(logs), "--redirects", "3"),
        *program,
    ]


def _environment(failures: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        DIRECTORY_VARIABLE: str(failures),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
