"""Processes that share the work on items: bounded, in order, and none of their accidents is the run's.

Workers are fresh processes without torch. One that dies (a decoder can crash, and the kernel ends what takes too much
memory) or hangs costs the item it had; another takes its place. They end when this process does.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from perl_megatron.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

START_SECONDS = 120.0
ITEM_SECONDS = 120.0
"""A worker that takes longer over an item is ended."""
END_SECONDS = 5.0
BOOT = """
import sys
sys.path[:] = {path!r}
from perl_megatron.data.pool_worker import main
main({descriptor})
"""


class WorkerDied(UserError):
    """The process that worked on an item ended, or took too long."""


class WorkerNotStarted(RuntimeError):
    """There is no process to work on an item."""


class WorkerPool(Generic[Item, Result]):
    """Applies ``function`` to items in ``num_processes`` processes, which are started when there is work for them.

    Args:
        function: of a module that does not import torch, or a ``functools.partial`` of one; pickled, as items and
            results are.
        num_processes: at least 1.
        item_seconds: after which a worker is taken for hung.
    """

    def __init__(self, function: Callable[[Item], Result], num_processes: int, *, item_seconds: float = ITEM_SECONDS):
        assert num_processes >= 1
        self.num_processes = num_processes
        self._function, self._item_seconds = function, item_seconds
        self._tasks: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, item: Item) -> Future[Result]:
        """The future result of ``item``: it raises what the function did, ``WorkerDied`` or ``WorkerNotStarted``.

        It is cancelled where the pool is closed.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                future.cancel()
                return future
            self._tasks.put((item, future))
            if len(self._threads) < self.num_processes:
                self._threads.append(threading.Thread(target=self._serve, name="worker of a pool", daemon=True))
                self._threads[-1].start()
        return future

    def in_order(self, items: Iterable[Item], *, ahead: int | None = None) -> Iterator[Future[Result]]:
        """A finished future for each item, in the items' order; at most ``ahead`` items are taken before their turn."""
        ahead = 4 * self.num_processes if ahead is None else ahead
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self.submit(item))
            if len(pending) > ahead:
                pending[0].exception()
                yield pending.popleft()
        while pending:
            pending[0].exception()
            yield pending.popleft()

    def close(self, seconds: float | None = None) -> None:
        """End the workers; items that wait are cancelled, and those under way waited for, at most ``seconds`` each."""
        waiting: list[Future[Result]] = []
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while not self._tasks.empty():
                task = self._tasks.get()
                waiting += [] if task is None else [task[1]]
            for _ in self._threads:
                self._tasks.put(None)
        for future in waiting:  # without the lock: whoever is told may have one of its own
            future.cancel()
        for thread in self._threads:
            thread.join(seconds)

    def __enter__(self) -> WorkerPool[Item, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self) -> None:
        """One thread for each worker: it hands over items one by one."""
        worker: _Worker | None = None
        while (task := self._tasks.get()) is not None:
            item, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or _Worker(self._function)
                result = worker.apply(item, self._item_seconds)
            except (EOFError, OSError) as error:  # the other end is closed; TimeoutError is an OSError
                assert worker is not None
                future.set_exception(WorkerDied(f"a worker process {worker.end(error)} over it"))
                worker = None
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        if worker is not None:
            worker.end(None)


class _Worker:
    """A worker process and the line to it."""

    def __init__(self, function: Callable[[Any], Any]):
        try:
            mine, its = socket.socketpair()
            with mine, its:
                program = BOOT.format(path=sys.path, descriptor=its.fileno())
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL
                )
                self._connection = Connection(mine.detach())
        except OSError as error:  # no memory, no processes or no open files are left
            raise WorkerNotStarted(f"a worker process could not be started: {error}") from error
        try:
            self._connection.send(function)
            self._receive(START_SECONDS)
        except (EOFError, OSError) as error:
            how = self.end(error)
            raise WorkerNotStarted(f"a worker process {how} before it was ready; its own message is above") from error

    def apply(self, item: object, seconds: float) -> Any:
        """What the function returns for ``item``; raises EOFError or OSError where the process is gone or hangs."""
        self._connection.send(item)
        kind, value = self._receive(seconds)
        if kind == "refused":
            raise value
        if kind == "failed":
            raise RuntimeError(f"in a worker process:\n{value}")
        return value

    def end(self, error: BaseException | None) -> str:
        """End the process; in words, how it ended."""
        self._connection.close()
        hangs = isinstance(error, TimeoutError)
        try:
            self._process.wait(0 if hangs else END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        status = self._process.wait()
        return str(error) if hangs else f"died (status {status})"

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise TimeoutError(f"took more than {seconds:g} s")
        return self._connection.recv()
