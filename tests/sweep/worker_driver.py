"""One worker of a sweep whose runs are `fake_run.py`'s: `worker_driver.py SWEEP.yaml OUTCOMES`."""

from __future__ import annotations

import sys
from pathlib import Path

from perl_megatron.config.sweep_file import read_sweep
from perl_megatron.errors import UserError
from perl_megatron.launch.failures import EXIT_USER_ERROR
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.sweep.storage import storage_failures
from perl_megatron.sweep.trial_run import TrialRun
from perl_megatron.sweep.worker import Worker

FAKE = Path(__file__).with_name("fake_run.py")


def use_fake_runs(outcomes: Path) -> None:
    real = TrialRun.command

    def command(self: TrialRun) -> list[str]:
        return [sys.executable, str(FAKE), str(outcomes), *real(self)[3:]]

    TrialRun.command = command  # type: ignore[method-assign]


if __name__ == "__main__":
    use_fake_runs(Path(sys.argv[2]))
    sweep = read_sweep(Path(sys.argv[1]))
    try:
        with StopRequest() as stop, storage_failures(sweep):
            sys.exit(Worker(sweep, stop).work())
    except UserError as error:
        print(error)
        sys.exit(EXIT_USER_ERROR)
