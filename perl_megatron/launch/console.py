"""What the launcher shows a person. That may be kept on a full disk, which must not end the ranks that it watches."""

from __future__ import annotations

import io
import sys
from typing import Literal

from perl_megatron.errors import is_full_disk


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
