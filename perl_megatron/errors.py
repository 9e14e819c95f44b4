"""The error that is meant for a person (what is wrong, where it was set, how to mend it), and kinds of other errors."""

from __future__ import annotations

import errno
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in a config, a dataset, a checkpoint or the environment.

    The command line prints it without a traceback. ``what`` says what is wrong, ``where`` names the file, config key
    or record that set it, and ``fix`` says what to do.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where is not None:
            lines.append(f"  where: {where}")
        if fix is not None:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Callable[..., UserError], tuple[str, str | None, str | None]]:
        """Errors travel between ranks: pickle the parts, not the joined text."""
        return _rebuild, (self.what, self.where, self.fix)


def is_full_disk(error: OSError) -> bool:
    """Whether the system said that there is no space left, or that a quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _rebuild(what: str, where: str | None, fix: str | None) -> UserError:
    return UserError(what, where=where, fix=fix)
