"""What tells the model in a Hugging Face folder from another one that is put there later."""

from __future__ import annotations

import hashlib
from pathlib import Path

from perl_megatron.errors import UserError

SAMPLED_BYTES = 2**20
"""Of the beginning and the end of a file of weights, which go into the model's digest."""

_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt")


def model_digest(folder: Path) -> str:
    """32 hexadecimal digits that change when a Hugging Face folder's config, tokenizer or weights do.

    Of each file of weights, name, size, beginning and end are looked at: training changes all of them. UserError for
    a folder that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in _SUFFIXES and file.is_file():
                size = file.stat().st_size
                digest.update(f"{file.name}:{size}:".encode())
                with file.open("rb") as content:
                    digest.update(content.read(SAMPLED_BYTES))
                    content.seek(max(size - SAMPLED_BYTES, 0))
                    digest.update(content.read())
    except OSError as error:
        raise UserError(
            f"cannot read the model: {error.strerror}", where=str(folder), fix="check model.path"
        ) from error
    return digest.hexdigest()
