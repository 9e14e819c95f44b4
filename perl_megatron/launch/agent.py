"""torchrun, deaf to the signals that end a run: its ranks are to finish what they are at, and it waits for them.

Batch systems send such signals to every process of a job at once. torchrun would take one for the end, and kill its
ranks half a minute later. ``supervise`` tells the ranks instead. The handlers are functions, as ranks would inherit
signals that are ignored.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from types import FrameType

from perl_megatron.launch.failures import EXIT_STOPPED, record_ends

DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PARENT_DIED = signal.SIGHUP
"""Ends torchrun, which passes it on to its ranks."""


def main() -> None:
    """Be `python -m torch.distributed.run` with the same arguments."""
    for number in DEAF_TO:
        signal.signal(number, _ignore)
    # torchrun's option --signals-to-handle, which older ones do not have; it would set handlers of its own.
    os.environ["PET_SIGNALS_TO_HANDLE"] = PARENT_DIED.name
    sys.argv[0] = "torchrun"
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except Exception as error:
        # torchrun's ChildFailedError knows who ended how. Its class is torch's, which this package does without.
        failures = getattr(error, "failures", {})
        ends = {rank: failure.exitcode for rank, failure in failures.items()}
        record_ends(ends)
        if EXIT_STOPPED in ends.values():  # by the status too: the rank had no room for a file (``stop_status``)
            raise SystemExit(EXIT_STOPPED) from error
        raise


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main()
