"""A run is told to end: SIGINT, SIGTERM and SIGUSR1 set a flag that all ranks read together."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what batch systems send as a warning, some time before they end a job."""


class StopRequest:
    """Context manager: the first of ``STOP_SIGNALS`` becomes a request, a further SIGINT raises KeyboardInterrupt.

    Main thread only. The handlers that were there before come back at the end.

    Args:
        last: the process ends after the block. Requests that come then, as they may reach the machines of a run one
            after the other, are ignored (but Ctrl-C): they would kill it where it only has to take its leave.
    """

    def __init__(self, *, last: bool = False) -> None:
        self._last = last
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._last and number != signal.SIGINT else handler)

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that this process got, if any."""
        return self._received

    @property
    def received_at(self) -> float:
        """When it came, in the seconds of ``time.monotonic``."""
        return self._received_at

    def requested(self, agree: Callable[[bool], bool] | None = None) -> bool:
        """Whether to stop now. `agree` says whether any rank was asked (`collective.any_rank`), so that all stop
        after the same step although the signal reaches them at different times; every rank has to call it.
        """
        mine = self._received is not None
        return mine if agree is None else agree(mine)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            self._received_at = time.monotonic()
            self._received = signal.Signals(number)


def leave_only_interrupt() -> None:
    """Let SIGINT alone end this process and all that it starts: SIGTERM does not reach them, whatever they do with it.

    Call it before there are threads, which have the mask of signals that their starter had.
    """
    # Whoever starts it lets SIGTERM through again (CPython's resource_tracker.py); all processes below use this one.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
