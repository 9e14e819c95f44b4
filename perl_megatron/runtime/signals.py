"""A run is told to end: SIGINT, SIGTERM and SIGUSR1 set a flag that all ranks read together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
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
        self._arrivals = _Arrivals()

    def __enter__(self) -> StopRequest:
        self._arrivals.open()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._last and number != signal.SIGINT else handler)
        self._arrivals.close()

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that this process got, if any."""
        return self._received

    @property
    def received_at(self) -> float:
        """When it came (not when Python got to it, which a long call holds back), in seconds of ``time.monotonic``."""
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
            # Python's handlers run in the order of the numbers, not of the arrivals.
            first, self._received_at = self._arrivals.first or (number, time.monotonic())
            self._received = signal.Signals(first)
            if number == signal.SIGINT != first:
                raise KeyboardInterrupt


class _Arrivals:
    """Which of ``STOP_SIGNALS`` came first, and when.

    Python's handlers wait until the main thread leaves the call that it is in, which may be a whole backward pass;
    Python's wakeup descriptor is written to at once, and a thread reads it. Who had the descriptor before still gets
    its bytes. Who takes it later (asyncio's ``add_signal_handler``) has it alone; then nothing is noted here.
    """

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None
        """Its number, and seconds of ``time.monotonic``; None where none has been noted (yet)."""

    def open(self) -> None:
        """Begin to take note. Main thread only, as ``close``."""
        self.first = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        _open.append(self)

    def close(self) -> None:
        """End it, and give the descriptor back."""
        if self not in _open:  # a forked process that leaves its parent's block
            return
        _open.remove(self)
        current = signal.set_wakeup_fd(-1)
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            signal.set_wakeup_fd(self._previous if current == self._writer.fileno() else current)
        self._writer.shutdown(socket.SHUT_RDWR)  # forked processes have it open too: closing it would not be its end
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _read(self) -> None:
        while numbers := self._reader.recv(64):
            now = time.monotonic()
            stops = [number for number in numbers if number in STOP_SIGNALS]
            if stops and self.first is None:
                self.first = stops[0], now
            if self._previous >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._previous, numbers)


_open: list[_Arrivals] = []


def _leave_to_parent() -> None:
    """A forked process has its parent's descriptor: a signal for it alone would be noted as one for its parent."""
    if _open:
        signal.set_wakeup_fd(-1)
        _open.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def leave_only_interrupt() -> None:
    """Let SIGINT alone end this process and all that it starts: SIGTERM does not reach them, whatever they do with it.

    Call it before there are threads, which have the mask of signals that their starter had.
    """
    # Whoever starts it lets SIGTERM through again (CPython's resource_tracker.py); all processes below use this one.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
