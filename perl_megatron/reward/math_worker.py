"""The process that compares mathematical expressions with math-verify. Run as a script by ``math_equivalence``.

A model's answer is hostile input: `9**9**9**9` keeps the interpreter inside one long C call that no Python-level signal
handler interrupts, and math-verify's own time limit is such a handler (it also works in main threads only). So every
comparison runs in a forked child of this process, whose CPU-time alarm has the default action: the kernel ends it. A
fork of the warm parent takes milliseconds, so a killed comparison costs no new import of sympy.

CPU time decides, not wall time: a verdict does not depend on how busy the machine is.

Protocol: one JSON line `[expected, given]` in; one line `equal` or `different` out; `ready` first. Ends with its input.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

CPU_SECONDS = 2.0
"""Limit of one comparison."""
WALL_SECONDS = 20.0
"""Backstop for a comparison that waits instead of working."""
MEMORY_BYTES = 2 << 30
"""Address space of one comparison."""


def compare(expected: str, given: str) -> bool:
    """Whether math-verify holds the two LaTeX expressions for equal (``expected`` is its gold side)."""
    from math_verify import parse, verify

    gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (expected, given))
    return bool(gold) and bool(answer) and bool(verify(gold, answer, timeout_seconds=None))


def compare_in_child(expected: str, given: str) -> bool:
    """``compare`` in a forked child with bounded time and memory; a child that dies means 'different'."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status) == 0
    equal = False
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        equal = compare(expected, given)
    finally:
        os._exit(0 if equal else 1)


def main() -> None:
    """Answer requests until the input ends."""
    logging.disable(logging.CRITICAL)  # math-verify warns of the time limits that are off here
    for number in (signal.SIGINT, signal.SIGTERM):  # a run that is asked to stop still finishes its step
        signal.signal(number, signal.SIG_IGN)
    replies: Any = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not mix with the replies
    for expected, given in (("\\frac{1}{2}", "0.5"), ("x^2+2x+1", "(x+1)^2"), ("2\\sqrt{3}", "\\sqrt{12}")):
        assert compare(expected, given), "math-verify does not work"  # also imports and caches what children need
    gc.freeze()  # keeps children from copying the parent's pages
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        expected, given = json.loads(line)
        print("equal" if compare_in_child(expected, given) else "different", file=replies, flush=True)


if __name__ == "__main__":
    main()
