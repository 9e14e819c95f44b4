"""A run whose disk is full goes on without what it would only have left for a person to read, and says so.

That is for logs. What fails to write a checkpoint or the policy still says so by an error (``checkpoint/disk.py``).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from perl_megatron.errors import is_full_disk

logger = logging.getLogger(__name__)


class FullDisk:
    """Keeps account of what could not be written; other errors than that of a full disk are raised.

    Args:
        tell: shows a person a line. It is called the first time that the disk is full, and by ``tell_missing``.
    """

    def __init__(self, tell: Callable[[str], object] = logger.warning):
        self._tell = tell
        self._was_full = False
        self.missing: Counter[str] = Counter()
        """What is missing, and how many of it."""

    @contextmanager
    def tolerated(self, what: str, count: int = 1) -> Iterator[None]:
        """Run the block; where the disk is full, go on behind it, with so many of ``what`` missing."""
        try:
            yield
        except OSError as error:
            if not is_full_disk(error):
                raise
            self.missing[what] += count
            self.found(error)

    def found(self, error: OSError) -> None:
        """It is full, which a person is told once."""
        if self._was_full:
            return
        self._was_full = True
        place = "" if error.filename is None else f" ({error.filename})"
        self._say(
            f"the disk is full: {error.strerror}{place}. The run goes on; rows of its logs wait until there is space, "
            "and what is missing in the end is told then"
        )

    def tell_missing(self) -> None:
        """At the end: what is missing, if the disk was full at all."""
        if not self._was_full:
            return
        missing = ", ".join(f"{what} ({count})" for what, count in sorted(self.missing.items()) if count)
        self._say(f"the disk was full; missing: {missing}" if missing else "the disk was full; nothing is missing")

    def _say(self, text: str) -> None:
        try:
            self._tell(text)
        except OSError as error:  # what a person reads may be a file on the same disk
            if not is_full_disk(error):
                raise
