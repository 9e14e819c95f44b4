"""The process that compares mathematical expressions with math-verify. Run as a script by ``math_equivalence``.

A model's answer is hostile input: `9**9**9**9` keeps the interpreter inside one long C call that no Python-level signal
handler interrupts, and math-verify's own time limit is such a handler (it also works in main threads only). So every
comparison runs in a forked child of this process, whose CPU-time alarm has the default action: the kernel ends it. A
fork of the warm parent takes milliseconds, so a killed comparison costs no new import of sympy, and several children
work at a time.

CPU time decides, not wall time: a verdict does not depend on how busy the machine is.

Protocol: one JSON line in, `{"pairs": [[expected, given], …], "cpu_seconds": limit of each, "budget": of those that are
ended, "at_once": children}`; one line out for each pair as it is decided, `INDEX VERDICT`. First a line `ready`. Ends
with its input.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

EQUAL, DIFFERENT, ENDED, SKIPPED = "equal", "different", "ended", "skipped"
"""Verdicts. 'ended': not decided within its limit; 'skipped': not begun, since others had used up the budget."""
WALL_SECONDS = 20.0
"""Backstop for a comparison that waits instead of working."""
MEMORY_BYTES = 2 << 30
"""Address space of one comparison."""
_EXIT_CODES = {EQUAL: 0, DIFFERENT: 10}


def compare(expected: str, given: str) -> bool:
    """Whether math-verify holds the two LaTeX expressions for equal (``expected`` is its gold side)."""
    from math_verify import parse, verify

    gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (expected, given))
    return bool(gold) and bool(answer) and bool(verify(gold, answer, timeout_seconds=None))


def compare_all(
    pairs: Sequence[tuple[str, str]], cpu_seconds: float, budget: float, at_once: int
) -> Iterator[tuple[int, str]]:
    """(index, verdict) of every pair, as they are decided; ``at_once`` children work at a time.

    No child is begun once those that were ended have taken ``budget`` CPU seconds.
    """
    running: dict[int, int] = {}
    waiting = iter(range(len(pairs)))
    while True:
        while len(running) < at_once and (index := next(waiting, None)) is not None:
            if budget <= 0:
                yield index, SKIPPED
            else:
                running[_fork(*pairs[index], cpu_seconds)] = index
        if not running:
            return
        pid, status, usage = os.wait4(-1, 0)
        exit_code = os.waitstatus_to_exitcode(status)
        verdict = next((name for name, code in _EXIT_CODES.items() if code == exit_code), ENDED)
        if verdict == ENDED:
            budget -= usage.ru_utime + usage.ru_stime
        yield running.pop(pid), verdict


def _fork(expected: str, given: str, cpu_seconds: float) -> int:
    """The process id of a child that compares within bounds of time and memory; its exit code is the verdict."""
    pid = os.fork()
    if pid:
        return pid
    verdict = DIFFERENT
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        verdict = EQUAL if compare(expected, given) else DIFFERENT
    finally:
        os._exit(_EXIT_CODES[verdict])


def main() -> None:
    """Answer requests until the input ends."""
    logging.disable(logging.CRITICAL)  # math-verify warns of the time limits that are off here
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # a run that is asked to stop still finishes its step
        signal.signal(number, signal.SIG_IGN)
    replies: Any = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not mix with the replies
    for expected, given in (("\\frac{1}{2}", "0.5"), ("x^2+2x+1", "(x+1)^2"), ("2\\sqrt{3}", "\\sqrt{12}")):
        assert compare(expected, given), "math-verify does not work"  # also imports and caches what children need
    gc.freeze()  # keeps children from copying the parent's pages
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        for index, verdict in compare_all(**json.loads(line)):
            print(index, verdict, file=replies, flush=True)


if __name__ == "__main__":
    main()
