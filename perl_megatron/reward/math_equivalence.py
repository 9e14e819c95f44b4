"""Mathematical equivalence through math-verify, with hard deadlines, from any thread of any process.

One comparison has ``CPU_SECONDS`` of CPU time; what cannot be decided in it is not equal. All comparisons of a step
together are bounded too, so that a policy that has learnt to write `9**9**9**9` in a thousand variants does not stall
the run: ``compare_all`` gives each a short first try, and a second one of full length only from a common budget.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence

from perl_megatron.reward import math_worker
from perl_megatron.reward.math_worker import ENDED, EQUAL, SKIPPED

MAX_LENGTH = 512
"""Characters; a longer expression is refused before it is parsed."""
MAX_DEPTH = 12
"""Nesting of brackets; the parser's time can double with each level."""
CPU_SECONDS = 2.0
"""Limit of one comparison."""
FIRST_CPU_SECONDS = 0.2
"""Limit of its first try, where many are compared; few honest ones take longer."""
BUDGET_CPU_SECONDS = 30.0
"""What the comparisons of one call of ``compare_all`` may take in vain in their second tries, all together."""
START_SECONDS = 120.0
REPLY_SECONDS = math_worker.WALL_SECONDS + 10.0
CACHE_SIZE = 65536
"""Verdicts that are kept, the latest ones: a pair that comes again is not compared again."""

logger = logging.getLogger(__name__)


def math_equal(expected: str, given: str) -> bool:
    """Whether two LaTeX expressions are mathematically equal, as math-verify sees it.

    Never takes longer than ``REPLY_SECONDS`` (and ``CPU_SECONDS`` of CPU time): what is too long, too deeply nested or
    cannot be decided in time is not equal.
    """
    return compare_all([(expected, given)])[expected, given]


def compare_all(pairs: Sequence[tuple[str, str]], *, at_once: int = 1) -> dict[tuple[str, str], bool]:
    """Whether each pair (expected, given) is equal, ``at_once`` comparisons at a time.

    Takes at most ``FIRST_CPU_SECONDS`` for each different pair, ``BUDGET_CPU_SECONDS`` and ``at_once · CPU_SECONDS`` of
    CPU time, and what the comparisons take that come to a verdict. Those left undecided are not equal; they are counted
    in a warning, and compared again where they come again.
    """
    verdicts = dict.fromkeys(pairs, False)
    waiting = []
    for expected, given in verdicts:
        if " ".join(expected.split()) == " ".join(given.split()):
            verdicts[expected, given] = True
        elif (expected, given) in _CACHE:
            verdicts[expected, given] = _CACHE[expected, given]
        elif is_tame(expected) and is_tame(given):
            waiting.append((expected, given))
    limits = [(FIRST_CPU_SECONDS, float("inf")), (CPU_SECONDS, BUDGET_CPU_SECONDS)][len(waiting) == 1 :]
    for cpu_seconds, budget in limits if waiting else ():
        decided = _WORKER.compare_all(waiting, cpu_seconds=cpu_seconds, budget=budget, at_once=at_once)
        known = {pair: verdict == EQUAL for pair, verdict in decided.items() if verdict not in (ENDED, SKIPPED)}
        if cpu_seconds == CPU_SECONDS:  # as much as anything gets: not equal, and not tried again
            known.update((pair, False) for pair, verdict in decided.items() if verdict == ENDED)
        verdicts.update(known)
        _remember(known)
        waiting = [pair for pair in waiting if pair not in known]
    if waiting:
        logger.warning(
            "%d of %d different mathematical answers were not compared, and count as wrong: others took up the "
            "%g seconds that a step gives to comparisons without a verdict",
            *(len(waiting), len(verdicts), BUDGET_CPU_SECONDS),
        )
    return verdicts


def is_tame(expression: str) -> bool:
    """Whether an expression is short and flat enough to be parsed."""
    if len(expression) > MAX_LENGTH:
        return False
    depth = 0
    for character in expression:
        depth += (character in "{([") - (character in "})]")
        if depth > MAX_DEPTH:
            return False
    return True


def _remember(known: dict[tuple[str, str], bool]) -> None:
    _CACHE.update(known)
    for pair in list(_CACHE)[: max(0, len(_CACHE) - CACHE_SIZE)]:  # the oldest
        _CACHE.pop(pair, None)


class MathWorker:
    """Owner of one ``math_worker`` process: started at the first comparison, ends when this process does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def compare(self, expected: str, given: str) -> bool:
        """One comparison; False where it is not decided within ``CPU_SECONDS``. Raises as ``compare_all``."""
        pair = expected, given
        return self.compare_all([pair], cpu_seconds=CPU_SECONDS, budget=CPU_SECONDS, at_once=1)[pair] == EQUAL

    def compare_all(
        self, pairs: Sequence[tuple[str, str]], *, cpu_seconds: float, budget: float, at_once: int
    ) -> dict[tuple[str, str], str]:
        """The verdicts (``math_worker``) of different pairs. A worker that stops replying is ended: 'ended'.

        Raises:
            RuntimeError: the worker does not start (its own message is on stderr) or is ended from outside repeatedly.
        """
        verdicts: dict[tuple[str, str], str] = {}
        settings = {"cpu_seconds": cpu_seconds, "budget": budget, "at_once": at_once}
        with self._lock:
            for _ in range(3):
                missing = [pair for pair in pairs if pair not in verdicts]
                if not missing:
                    return verdicts
                if not self._is_running():
                    self._start()
                reply: bytes | None = b""
                self._write(json.dumps({"pairs": missing, **settings}).encode() + b"\n")
                for _ in missing:
                    reply = self._read(REPLY_SECONDS)
                    if not reply:
                        break
                    index, verdict = reply.decode().split()
                    verdicts[missing[int(index)]] = verdict
                if reply == b"":
                    return dict.fromkeys(pairs, ENDED) | verdicts
                if reply is None:
                    self.close()
            if len(verdicts) == len(pairs):
                return verdicts
        raise RuntimeError("the math-verify worker was ended from outside, three times in a row")

    def close(self) -> None:
        """End the worker, if this process started one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            with process:  # waits for it and closes its pipes
                process.kill()

    def _is_running(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def _start(self) -> None:
        self.close()
        # By path and with -P, so that the worker neither needs the package nor mistakes its neighbours for modules.
        command = [sys.executable, "-P", math_worker.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._owner = os.getpid()
        if self._read(START_SECONDS) != b"ready\n":
            self.close()
            raise RuntimeError(f"the math-verify worker did not start: {' '.join(command)}")

    def _write(self, request: bytes) -> None:
        """Send a request; whether the worker is there to take it shows in its reply."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            view = memoryview(request)
            while view:  # an unbuffered pipe may take a part only
                view = view[self._process.stdin.write(view) or 0 :]
        except BrokenPipeError:
            pass

    def _read(self, seconds: float) -> bytes | None:
        """The next line, b'' if it did not come in time (the worker is ended), None if the worker is gone."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        if not ready:
            self.close()
            return b""
        return process.stdout.readline() or None


_WORKER = MathWorker()
_CACHE: dict[tuple[str, str], bool] = {}
