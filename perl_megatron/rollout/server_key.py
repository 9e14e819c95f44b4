"""The key that a server demands and a trainer sends."""

from __future__ import annotations

from pathlib import Path

from perl_megatron.errors import UserError

MIN_CHARACTERS = 16


def read_key(file: Path | None) -> str | None:
    """The key in `rollout.api_key_file`; None where none is set. UserError for a file that holds no usable key."""
    if file is None:
        return None
    where = f"rollout.api_key_file = {file}"
    try:
        lines = file.read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key cannot be read: {error}", where=where, fix="write a key into it") from error
    key = lines[0].strip()
    if len(key) < MIN_CHARACTERS or not key.isprintable() or " " in key:
        raise UserError(
            f"the first line is not a key: at least {MIN_CHARACTERS} characters, without spaces",
            where=where,
            fix=f"python -c 'import secrets; print(secrets.token_urlsafe())' > {file}",
        )
    return key
