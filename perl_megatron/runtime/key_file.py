"""Files that hold the key of a server: of rollout servers, and of chat endpoints."""

from __future__ import annotations

from pathlib import Path

from perl_megatron.errors import UserError

MIN_CHARACTERS = 16
NEW_KEY = "python -c 'import secrets; print(secrets.token_urlsafe())'"


def read_key(file: Path | None, setting: str, *, fix: str = f"{NEW_KEY} > {{file}}") -> str | None:
    """The key in the file's first line; None where there is no file.

    Args:
        setting: the config key that names the file, for the error.
        fix: how to come by a file with a key; ``{file}`` stands for its path.

    Raises:
        UserError: the file cannot be read or holds no usable key; what it holds is not shown.
    """
    if file is None:
        return None
    where = f"{setting} = {file}"
    try:
        lines = file.read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds more than ASCII characters"
        raise UserError(f"the key cannot be read: {reason}", where=where, fix="write a key into it") from None
    key = lines[0].strip()
    if len(key) < MIN_CHARACTERS or not key.isprintable() or " " in key:
        raise UserError(
            f"the first line is not a key: at least {MIN_CHARACTERS} characters, without spaces",
            where=where,
            fix=fix.format(file=file),
        )
    return key
