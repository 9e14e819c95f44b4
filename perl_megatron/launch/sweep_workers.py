"""Workers of a sweep on this machine: each with its share of the cores, and of the GPUs where there are some."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from perl_megatron.errors import UserError
from perl_megatron.launch.supervise import PR_SET_PDEATHSIG

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.2


def stop_with_parent() -> None:
    """In a new child on Linux: get SIGTERM when the parent dies, even if by SIGKILL.

    A run then ends its step and writes a checkpoint, which whoever takes its parent's place goes on from.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


@dataclass(frozen=True)
class Share:
    """What one worker has of the machine."""

    cores: frozenset[int]
    devices: tuple[str, ...] | None
    """GPUs by index or UUID; None: the machine has none."""


def divide(cores: Sequence[int], devices: Sequence[str] | None, *, workers: int, processes: int) -> list[Share]:
    """Shares of equal size. With GPUs each worker has as many as its run has processes; UserError for too few."""
    if devices is not None and workers * processes > len(devices):
        raise UserError(
            f"{workers} workers with {processes} processes a run need {workers * processes} GPUs, "
            f"and there are {len(devices)}",
            where="--workers",
            fix=f"at most {len(devices) // processes} workers fit on this machine",
        )
    shares = []
    for number in range(workers):
        own = frozenset(cores[number::workers]) or frozenset((cores[number % len(cores)],))
        gpus = None if devices is None else tuple(devices[number * processes : (number + 1) * processes])
        shares.append(Share(own, gpus))
    return shares


def visible_devices() -> list[str] | None:
    """The GPUs that this process may use; None where the machine has none. Asks the driver, not torch."""
    chosen = os.environ.get(DEVICES_VARIABLE)
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()] or None
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return listed.stdout.split() or None if listed.returncode == 0 else None


def run_workers(command: Sequence[str], *, workers: int, processes: int) -> list[int]:
    """Run the command so many times at once, until all have ended; returns their statuses.

    The first SIGINT or SIGTERM is passed to all, once: each ends its run's step and puts the trial back. They get
    SIGTERM too where this process dies.
    """
    shares = divide(sorted(os.sched_getaffinity(0)), visible_devices(), workers=workers, processes=processes)
    children = [_start(command, share) for share in shares]

    def on_signal(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return [child.returncode for child in children]


def _start(command: Sequence[str], share: Share) -> subprocess.Popen[bytes]:
    devices = {} if share.devices is None else {DEVICES_VARIABLE: ",".join(share.devices)}

    def in_child() -> None:
        stop_with_parent()
        os.sched_setaffinity(0, share.cores)  # a run uses as many threads as it may have cores

    return subprocess.Popen(
        list(command),
        env={**os.environ, **devices},
        start_new_session=True,  # Ctrl-C reaches it through this process only
        preexec_fn=in_child,  # noqa: PLW1509 - only system calls, no lock is taken
    )
