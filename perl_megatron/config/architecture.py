"""The numbers of a policy that the layout depends on, read from its `config.json` without transformers or torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_megatron.errors import UserError


@dataclass(frozen=True)
class ArchitectureNumbers:
    """Sizes of a Qwen2.5-VL policy."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    vocabulary_size: int
    vision_ffn_size: int
    vision_num_heads: int


_TEXT = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocabulary_size": "vocab_size",
}
_VISION = {
    "vision_ffn_size": "intermediate_size",
    "vision_num_heads": "num_heads",
}


def read_architecture_numbers(path: Path | str) -> ArchitectureNumbers:
    """Read the folder's `config.json`: transformers 5's layout (`text_config`) or the published flat one.

    Raises UserError where the folder or file is missing, is not JSON, is another model type, or lacks a number.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            "the policy's config.json does not exist", where=f"model.path = {folder}", fix="give a Hugging Face folder"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not a readable JSON file: {error}", where=str(file)) from error
    if not isinstance(content, dict) or content.get("model_type") != "qwen2_5_vl":
        model_type = content.get("model_type") if isinstance(content, dict) else None
        raise UserError(
            f"the policy's model type is {model_type!r}", where=str(file), fix="give a Qwen2.5-VL checkpoint"
        )
    text = content.get("text_config", content)
    vision = content.get("vision_config", {})
    numbers = {name: _number(text, key, file) for name, key in _TEXT.items()}
    numbers |= {name: _number(vision, key, file) for name, key in _VISION.items()}
    return ArchitectureNumbers(**numbers)


def _number(section: Any, key: str, file: Path) -> int:
    value = section.get(key) if isinstance(section, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"'{key}' is {value!r}, not a positive whole number", where=str(file))
    return value
