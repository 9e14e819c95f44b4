"""What a command shows a person. That may be kept on a full disk, which must not end the ranks that it watches, or be
read by one who goes before the end (`… | head`).
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Literal, TextIO

from perl_megatron.errors import is_full_disk

EXIT_UNREAD = 141
"""Of a command whose output nobody reads any more: what a shell says of one that SIGPIPE has ended (128 + 13)."""


def say(text: str) -> None:
    """Print a line on standard error."""
    show(f"{text}\n", "stderr")


def show(text: str, stream: Literal["stdout", "stderr"]) -> None:
    """Print text now, or leave it out where the disk is full."""
    console = getattr(sys, stream)
    try:
        console.write(text)
        console.flush()
    except OSError as error:
        if not is_full_disk(error):
            raise
        # What is left in its buffer Python would try once more at the end, and then end with a status of its own.
        setattr(sys, stream, io.TextIOWrapper(io.FileIO(console.fileno(), "w", closefd=False), write_through=True))


def flush_output() -> None:
    """Write what is left of standard output; BrokenPipeError where its reader has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass  # Python tries once more at the end, and says it


def is_unread() -> bool:
    """Whether a reader of standard output or error has gone. What is not written yet is then dropped."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _has_lost_its_reader(stream)]
    for stream in gone:  # else Python would try to write the rest at the end
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    return bool(gone)


def _has_lost_its_reader(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError):  # of a stand-in without a descriptor
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False
