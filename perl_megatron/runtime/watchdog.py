"""Deadlines of phases: where one expires, every rank's place and stack is shown, and the job ends.

Each rank has a thread that looks at its own phases. The ranks find each other through the store of the rendezvous, by a
connection of its own, so a rank that is stuck in a collective still answers. Where a rank's interpreter is held (by a
library that waits with Python's lock), no thread of it can answer; then faulthandler, which needs no lock, shows its
stack in its own log and ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from perl_megatron.launch.failures import EXIT_FAILURE, record_failure

POLL_SECONDS = 0.5
ANSWER_SECONDS = 5.0
"""So long is waited for the stacks of the other ranks."""
HELD_SECONDS = 15.0
"""So long after its deadline a rank whose interpreter is held ends by itself."""
BETWEEN = "between"
"""What is watched from the end of a phase to the beginning of the next one: writing logs, asking whether to stop."""
_WAITING = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
"""Files that a rank is in while it waits for others."""


class DeadlineError(RuntimeError):
    """A phase took longer than it may."""


@dataclass(frozen=True)
class _Entered:
    name: str
    since: float
    deadline: float


class Watchdog:
    """Context manager: from its beginning to its end the phases of this process are watched.

    Args:
        deadlines: phase → seconds that it may take, or ``BETWEEN``; what is not named is not watched.
        rank: this process's.
        world_size: number of processes; with several the process group has been initialised.
    """

    def __init__(self, deadlines: Mapping[str, float], *, rank: int, world_size: int):
        self._deadlines, self._rank, self._world_size = deadlines, rank, world_size
        self._phases: list[_Entered] = []
        self._last: str | None = None
        self._num_entered = 0
        self._main = threading.main_thread().ident
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store: dist.Store | None = None
        if world_size > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore(f"watchdog-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a phase; it may be within another one. Main thread only."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """A phase begins; ``leave`` ends it."""
        self._num_entered += 1
        self._phases = [*self._open(), self._entered(name)]
        self._arm()

    def leave(self) -> None:
        """The innermost phase is over."""
        self._last = self._phases[-1].name
        self._phases = self._phases[:-1] or [self._entered(BETWEEN)]
        self._arm()

    def _entered(self, name: str) -> _Entered:
        return _Entered(name, time.monotonic(), self._deadlines.get(name, float("inf")))

    def _open(self) -> list[_Entered]:
        """The phases that have been entered and not left."""
        return [entered for entered in self._phases if entered.name != BETWEEN]

    def _arm(self) -> None:
        left = [entered.since + entered.deadline - time.monotonic() for entered in self._phases]
        if left and min(left) < threading.TIMEOUT_MAX and sys.__stderr__ is not None:
            seconds = max(min(left), 0) + HELD_SECONDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            now = time.monotonic()
            expired = [entered for entered in self._phases if now - entered.since > entered.deadline]
            try:
                if expired or (self._store is not None and self._store.check(["expired"])):
                    self._end_job(expired[0] if expired else None)
            except RuntimeError:  # the rendezvous is gone, as when other ranks have ended; this one is still watched
                self._store = None

    def _end_job(self, expired: _Entered | None) -> NoReturn:
        store, mine = self._store, self._place()
        if store is None:
            assert expired is not None, "a single process looks at its own deadlines alone"
            self._tell("\n".join([_what(expired, self._rank), *_describe(self._rank, mine)]))
            os._exit(EXIT_FAILURE)
        if expired is not None:
            what = {"rank": self._rank, "num_entered": mine["num_entered"], "text": _what(expired, self._rank)}
            store.compare_set("expired", "", json.dumps(what))
        store.set(f"place-{self._rank}", json.dumps(mine))
        if store.add("reporters", 1) == 1:
            self._tell(self._report(store))
            store.set("reported", "")
        else:
            # torchrun ends all ranks as soon as one has ended: the report comes first.
            _wait_for(store, "reported", 2 * ANSWER_SECONDS)
        os._exit(EXIT_FAILURE)

    def _report(self, store: dist.Store) -> str:
        """Which phase, which ranks the others wait for, and all stacks."""
        first, end = json.loads(store.get("expired")), time.monotonic() + ANSWER_SECONDS
        places: dict[int, dict[str, Any]] = {}
        for rank in range(self._world_size):
            if _wait_for(store, f"place-{rank}", end - time.monotonic()):
                places[rank] = json.loads(store.get(f"place-{rank}"))
        missing = [
            rank
            for rank in range(self._world_size)
            if rank not in places
            or places[rank]["num_entered"] != first["num_entered"]
            or not places[rank]["waits_for_others"]
        ]
        lines = [first["text"], f"ranks that the others wait for: {', '.join(map(str, missing)) or 'none is plain'}"]
        for rank in range(self._world_size):
            lines += _describe(rank, places.get(rank))
        return "\n".join(lines)

    def _place(self) -> dict[str, Any]:
        """Where this rank is, for the others."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != self._thread.ident}
        stacks = {
            names.get(ident, str(ident)) if ident != self._main else "main": "".join(traceback.format_stack(frame))
            for ident, frame in sorted(frames.items(), key=lambda pair: pair[0] != self._main)
        }
        innermost = traceback.extract_stack(frames[self._main])[-3:] if self._main in frames else []
        now = time.monotonic()
        return {
            "phases": [[entered.name, now - entered.since] for entered in self._open()],
            "last": self._last,
            "num_entered": self._num_entered,
            "waits_for_others": any(part in frame.filename for frame in innermost for part in _WAITING),
            "stacks": stacks,
        }

    def _tell(self, report: str) -> None:
        error = DeadlineError(report)
        if not record_failure(error):
            print(f"{type(error).__name__}: {report}", file=sys.stderr, flush=True)


def _what(expired: _Entered, rank: int) -> str:
    return f"phase '{expired.name}' took longer than deadlines.{expired.name} = {expired.deadline:g} s (on rank {rank})"


def _describe(rank: int, place: dict[str, Any] | None) -> list[str]:
    if place is None:
        return [f"rank {rank}: gives no answer; its own log may have its stack"]
    phases = ", in it ".join(f"'{name}' for {seconds:.0f} s" for name, seconds in place["phases"])
    where = f"in phase {phases}" if phases else f"between phases, after '{place['last']}'"
    waits = ", waiting for other ranks" if place["waits_for_others"] else ""
    lines = [f"rank {rank}: {where}{waits}"]
    for thread, stack in place["stacks"].items():
        lines += [f"  thread '{thread}':", *(f"  {line}" for line in stack.splitlines())]
    return lines


def _wait_for(store: dist.Store, key: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True
