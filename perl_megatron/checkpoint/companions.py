"""What a folder of weights holds beside them: config, tokenizer, processor, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model")
_OF_THE_WEIGHTS = ("model.safetensors.index.json", "metadata.json", "manifest.json", "training_state.json")
"""These describe one folder's weight files, in Hugging Face's format or torch_dist's."""


def companions(folder: Path) -> list[Path]:
    """The files that belong to the model in whatever format its weights are."""
    found = {file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in _OF_THE_WEIGHTS)


def copy_companions(source: Path, folder: Path, dtypes: Collection[torch.dtype]) -> None:
    """Copy them; the config is told the weights' dtype if they have one and the same."""
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)
    if len(dtypes) == 1:
        config = json.loads((source / "config.json").read_text())
        _set_dtype(config, str(next(iter(dtypes))).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """The config says in which dtype loaders build the model; it may differ from the source's."""
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    for section in (config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section, dict) and key in section:
                section[key] = dtype
