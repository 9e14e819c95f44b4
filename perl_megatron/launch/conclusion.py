"""What a person reads when the ranks have ended, and the exit status of the launcher."""

from __future__ import annotations

import signal
from pathlib import Path

from perl_megatron.launch.console import say
from perl_megatron.launch.failures import (
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    Failure,
    first_failure,
    read_ends,
    was_stopped,
)

EXIT_INTERRUPTED = 130
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
"""What kills a rank that did nothing wrong; those that torchrun ends are not among the ends."""


def conclude(
    code: int, logs: Path, *, ended_at_once: bool, asked_by: signal.Signals | None = None, run: Path | None = None
) -> int:
    """Tell a person how the job ended, the first failure last.

    Args:
        code: torchrun's exit code (``agent``).
        logs: of all ranks, with what they and torchrun said of their ends.
        ended_at_once: whether the launcher killed all ranks.
        asked_by: the signal that asked the run to stop, if one did.
        run: the run's folder, whose newest checkpoint is named.

    Returns:
        0; 75 for a run that was stopped by request, also where a rank was killed before it had saved, or where nothing
        is known of its end, unless a person asked by Ctrl-C: it was preempted, and goes on from its newest checkpoint;
        2 for a user's mistake; 130 for one that Ctrl-C ended at once, or before its first step; 1 for the rest, such
        as a rank that crashed after the request.
    """
    by_person = asked_by in (None, signal.SIGINT)
    if ended_at_once:
        say(f"ended at once; logs: {logs}")
        return EXIT_INTERRUPTED if by_person else EXIT_STOPPED
    if code == 0:
        return EXIT_STOPPED if was_stopped(logs / "failures") else 0
    failure, ends = first_failure(logs / "failures"), read_ends(logs / "failures")
    if failure is None and not ends:
        failure = _failure_of_another_machine(logs)
    if failure is not None and failure.user_error:
        say(f"error: {failure.text}")
        return EXIT_USER_ERROR
    if failure is None and EXIT_STOPPED in (code, *ends.values()):
        return EXIT_STOPPED  # the rank had no room to say so by a file
    # Nothing but the outside kills by SIGKILL: what other ranks say of it are echoes.
    was_killed = -signal.SIGKILL in ends.values()
    if failure is not None and not was_killed:
        say(f"\nrank {failure.rank} failed first:\n{failure.text}logs of all ranks: {logs}")
        return EXIT_FAILURE
    if asked_by is not None and ends and _died_of(asked_by, ends):
        say(f"stopped before the first step; logs: {logs}")
        return EXIT_INTERRUPTED if by_person else EXIT_STOPPED
    if failure is not None:
        say(f"\nrank {failure.rank} says:\n{failure.text.rstrip()}")
    if not ends:
        say("\nno rank said why: one was killed (out of memory?) or crashed; torchrun's account:")
        say(_tail(logs / "torchrun.log"))
    say("\n".join([*_account(ends, asked_by), *_newest_checkpoint(run), f"logs of all ranks: {logs}"]))
    # An error of the program's own, which would come again, is not made up for by the request.
    was_taken_away = not ends or any(-code in FROM_OUTSIDE for code in ends.values())
    return EXIT_STOPPED if was_taken_away and not by_person else EXIT_FAILURE


def _failure_of_another_machine(logs: Path) -> Failure | None:
    """What ranks elsewhere said, where the machines of a job keep their logs side by side (``--logs``)."""
    if not logs.name.startswith("node-"):
        return None
    return first_failure(*logs.parent.glob("node-*/failures"))


def _died_of(request: signal.Signals, ends: dict[int, int]) -> bool:
    """Whether the ranks died of the request to stop, which they listen to from before their first step on.

    Python ends with status 1 where it cannot end by the signal of Ctrl-C.
    """
    return set(ends.values()) <= {-request, 1 if request == signal.SIGINT else -request}


def _account(ends: dict[int, int], asked_by: signal.Signals | None) -> list[str]:
    """How ranks ended, those that were killed last."""
    after = "" if asked_by is None else f", after the run was told to stop ({asked_by.name})"
    why = " (out of memory?)" if asked_by is None else ""
    lines = []
    for rank, code in sorted(ends.items(), key=lambda end: (end[1] == -signal.SIGKILL, end)):
        if code < 0:
            lines.append(f"rank {rank} was killed by {_name(-code)}{why if code == -signal.SIGKILL else ''}{after}")
        else:
            lines.append(f"rank {rank} ended with status {code}{after}")
    return lines


def _newest_checkpoint(run: Path | None) -> list[str]:
    if run is None:
        return []
    # What has that name is whole: it is renamed last (``checkpoint/manifest.py``).
    checkpoints = sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))
    if not checkpoints:
        return [f"no checkpoint was written yet in {run}"]
    return [f"newest checkpoint, from which --resume goes on: {checkpoints[-1]}"]


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _tail(path: Path, num_lines: int = 25) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])
