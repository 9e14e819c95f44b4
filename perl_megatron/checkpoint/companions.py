"""What a folder of weights holds beside them: config, tokenizer, processor, chat template, generation config."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from perl_megatron.errors import UserError

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")
_OF_THE_WEIGHTS = ("model.safetensors.index.json", "metadata.json", "manifest.json", "training_state.json")
"""These describe one folder's weight files, in Hugging Face's format or torch_dist's."""


def companions(folder: Path) -> list[Path]:
    """The files that belong to the model in whatever format its weights are."""
    found = {file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in _OF_THE_WEIGHTS)


def copy_companions(source: Path, folder: Path, dtypes: Collection[torch.dtype]) -> None:
    """Copy them; the config is told the weights' dtype if they have one and the same.

    UserError for a file that cannot be read, OSError for one that cannot be written.
    """
    for file in companions(source):
        content = _read(file)
        if file == source / "config.json" and len(dtypes) == 1:
            config = json.loads(content)
            _set_dtype(config, str(next(iter(dtypes))).removeprefix("torch."))
            content = (json.dumps(config, indent=2) + "\n").encode()
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read a file that goes along with the weights: {error.strerror or error}",
            where=str(file),
            fix="copy it again, or take another folder",
        ) from error


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """The config says in which dtype loaders build the model; it may differ from the source's."""
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    for section in (config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section, dict) and key in section:
                section[key] = dtype
