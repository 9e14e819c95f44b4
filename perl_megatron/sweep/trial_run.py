"""One training run of a trial: a `perl-megatron train` process that is watched through its metrics.jsonl."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from perl_megatron.launch.failures import EXIT_STOPPED, EXIT_USER_ERROR
from perl_megatron.launch.job_step import JobStep
from perl_megatron.launch.sweep_workers import stop_with_parent
from perl_megatron.observability.json_lines import read_rows
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.sweep.measure import Measure

POLL_SECONDS = 0.5
LOG_TAIL_LINES = 15
KILL_SECONDS = 10.0
"""What a killed process may take to be gone: one in the middle of writing to a network disk cannot go at once."""
STEP_END_SECONDS = 60.0
"""In which Slurm ends a step on all machines."""


class RunStoppedError(Exception):
    """A run was told to stop by somebody else than its worker: its machine is taken, say, by a preempting job."""


class RunFailedError(Exception):
    """A run ended by itself and without its last step."""

    def __init__(self, message: str, *, user_error: bool):
        super().__init__(message)
        self.user_error = user_error
        """Whether it was refused: it would be again."""


@dataclass(frozen=True)
class Observation:
    """A value of the metric."""

    step: int
    value: float


class TrialRun:
    """A run in its folder.

    Args:
        config: the config file.
        overrides: of this run, without its name and directory.
        folder: its folder; what is there is continued if it has a checkpoint.
        lock: descriptor of the point's lock, which `perl-megatron train` inherits, and nothing that it starts. With
            several ranks that is their launcher: it ends after them, unless it is killed itself, by SIGKILL; then they
            get a signal, and end when the lock is free already.
        step: on several machines of a Slurm job; None: a process of this machine.
    """

    def __init__(self, config: Path, overrides: Sequence[str], folder: Path, *, lock: int, step: JobStep | None = None):
        self.folder, self._config, self._overrides, self._lock = RunFolder(folder), config, overrides, lock
        self.log = folder.with_name(f"{folder.name}.log")
        self._step, self._stop_file = step, folder.with_name(f"{folder.name}.stop")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_done(self) -> bool:
        """Whether all steps are done: the summary is the last but one thing that a run writes."""
        return self.folder.summary.is_file()

    def command(self) -> list[str]:
        """What starts it, or continues it from its last checkpoint."""
        resume = ["--resume"] if self._has_checkpoint() else []
        place = [f"run.name={self.folder.root.name}", f"run.directory={self.folder.root.parent}"]
        arguments = [str(self._config), *resume, *self._overrides, *place]
        if self._step is not None:
            return self._step.train_command(arguments, self._stop_file)
        return [sys.executable, "-m", "perl_megatron", "train", *arguments]

    def start(self) -> bool:
        """Begin or continue; returns whether it continues from a checkpoint. Its output is added to ``log``."""
        continues = self._has_checkpoint()
        if not continues:
            shutil.rmtree(self.folder.root, ignore_errors=True)  # what ended before its first checkpoint
        self.folder.root.parent.mkdir(parents=True, exist_ok=True)
        self._stop_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock,),
                # Ctrl-C reaches it through the worker only, once.
                start_new_session=True,
                preexec_fn=stop_with_parent,  # noqa: PLW1509 - only a system call, no lock is taken
            )
        return continues

    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def wait(self, metric: str) -> Iterator[Observation | None]:
        """The values of the metric in order, and None at every look in between, until the process has ended.

        Of a run that is done already, all values. Raises RunStoppedError where it ended without its last step because
        it was told to, RunFailedError where it did so by itself.
        """
        seen, changed = -1, (0, 0)
        while True:
            running = self.is_running()  # before the look at the file, so that nothing is missed at the end
            now = _signature(self.folder.metrics)
            if now != changed:
                changed = now
                for row in read_rows(self.folder.metrics):
                    if row["step"] > seen and row.get(metric) is not None:
                        seen = row["step"]
                        yield Observation(seen, row[metric])
            if not running:
                break
            yield None
            time.sleep(POLL_SECONDS)
        status = 0 if self._process is None else self._process.returncode
        if status == EXIT_STOPPED:
            raise RunStoppedError(f"the run {self.folder.root} was told to stop")
        if status != 0 or not self.is_done:
            raise RunFailedError(self._failure(status), user_error=status == EXIT_USER_ERROR)

    def stop(self, seconds: float) -> None:
        """Ask it to end its step and to write a checkpoint; after so many seconds end all its processes."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if self._step is None:
            process.terminate()
        else:
            self._stop_file.touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        self.kill()
        self._stop_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End all its processes now."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if self._step is not None:  # only srun reaches the other machines
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STEP_END_SECONDS)
                return
        tree = [psutil.Process(process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += tree[0].children(recursive=True)
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        end = time.monotonic() + KILL_SECONDS
        while any(map(_lives, tree)) and time.monotonic() < end:  # ranks too: the lock does not wait for them
            time.sleep(0.01)

    def drop_weights(self) -> None:
        """Delete checkpoints and exported policy."""
        for path in (self.folder.checkpoints, self.folder.export):
            shutil.rmtree(path, ignore_errors=True)

    def value(self, measure: Measure) -> float | None:
        """Of the rows so far; None where the metric was never a finite number."""
        return measure.of(read_rows(self.folder.metrics))

    def _has_checkpoint(self) -> bool:
        return any(self.folder.checkpoints.glob("step-*"))

    def _failure(self, status: int) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"the run {self.folder.root} ended with status {status}; {self.log} ends with:", *lines])


def _lives(process: psutil.Process) -> bool:
    """Whether it can still do something; one whose end nobody has asked for yet cannot."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signature(path: Path) -> tuple[int, int]:
    """(time of change, size) of a file; zeros where it is absent."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
