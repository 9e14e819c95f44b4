"""Mathematical equivalence through math-verify, with a hard deadline, from any thread of any process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from functools import lru_cache

from perl_megatron.reward import math_worker

MAX_LENGTH = 512
"""Characters; a longer expression is refused before it is parsed."""
MAX_DEPTH = 12
"""Nesting of brackets; the parser's time can double with each level."""
START_SECONDS = 120.0
REPLY_SECONDS = math_worker.WALL_SECONDS + 10.0


@lru_cache(maxsize=16384)
def math_equal(expected: str, given: str) -> bool:
    """Whether two LaTeX expressions are mathematically equal, as math-verify sees it.

    Never takes longer than ``REPLY_SECONDS`` (and ``math_worker.CPU_SECONDS`` of CPU time): what is too long, too
    deeply nested or cannot be decided in time is not equal.
    """
    if " ".join(expected.split()) == " ".join(given.split()):
        return True
    if not (is_tame(expected) and is_tame(given)):
        return False
    return _WORKER.compare(expected, given)


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


class MathWorker:
    """Owner of one ``math_worker`` process: started at the first comparison, ends when this process does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def compare(self, expected: str, given: str) -> bool:
        """Ask the worker; without a reply in time the worker is ended and the answer is False.

        Raises:
            RuntimeError: the worker does not start (its own message is on stderr) or is ended from outside repeatedly.
        """
        request = json.dumps([expected, given]).encode() + b"\n"
        with self._lock:
            for _ in range(3):
                if not self._is_running():
                    self._start()
                reply = self._ask(request, REPLY_SECONDS)
                if reply is not None:
                    return reply == b"equal\n"
                self.close()
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
        if self._ask(b"", START_SECONDS) != b"ready\n":
            self.close()
            raise RuntimeError(f"the math-verify worker did not start: {' '.join(command)}")

    def _ask(self, request: bytes, seconds: float) -> bytes | None:
        """The reply to a request, b'' if it did not come in time (the worker is ended), None if the worker is gone."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        if not ready:
            self.close()
            return b""
        return process.stdout.readline() or None


_WORKER = MathWorker()
