"""The numbers of a policy that its layout and cost depend on, from its `config.json`, without transformers or torch."""

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
    head_dim: int
    vocabulary_size: int
    vision_depth: int
    vision_hidden_size: int
    vision_ffn_size: int
    vision_num_heads: int
    vision_out_hidden_size: int
    vision_patch_values: int
    """Numbers in one patch: 1176 = 3 channels · 2 frames · 14 · 14 pixels."""
    vision_merge_size: int
    """Side in patches of a merged cell, which is one token of the language model."""
    vision_window_patches: int
    """Patches of a whole attention window: 64."""
    vision_full_attention_blocks: tuple[int, ...]
    """0-based blocks that attend over the whole image, not over windows."""
    tied_embeddings: bool = False
    """Whether the output layer is the embedding (the 3B model) or its own matrix."""


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
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "out_hidden_size": 3584,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
}
"""What transformers takes where the file leaves it out."""
_FULL_ATTENTION_BLOCKS = [7, 15, 23, 31]
_FIX = "copy the file again from where the policy was published or exported"


def read_architecture_numbers(path: Path | str) -> ArchitectureNumbers:
    """Read the folder's `config.json`: transformers 5's layout (`text_config`) or the published flat one.

    Raises UserError where the folder or file is missing, is not JSON, is another model type, or lacks a number.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        fix = f"give a Hugging Face folder, or make it first; paths are relative to the current directory, {Path.cwd()}"
        raise UserError("the policy's config.json does not exist", where=f"model.path = {folder}", fix=fix)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not a readable JSON file: {error}", where=str(file), fix=_FIX) from error
    if not isinstance(content, dict) or content.get("model_type") != "qwen2_5_vl":
        model_type = content.get("model_type") if isinstance(content, dict) else None
        raise UserError(
            f"the policy's model type is {model_type!r}", where=str(file), fix="give a Qwen2.5-VL checkpoint"
        )
    text = content.get("text_config", content)
    vision = content.get("vision_config", {})
    numbers = {name: _number(text, key, file) for name, key in _TEXT.items()}
    numbers |= {name: _number(vision, key, file) for name, key in _VISION.items()}
    # As in transformers, the flat layout has no such key.
    own_head_dim = "text_config" in content and text.get("head_dim") is not None
    numbers["head_dim"] = (
        _number(text, "head_dim", file) if own_head_dim else numbers["hidden_size"] // numbers["num_heads"]
    )
    return ArchitectureNumbers(
        **numbers,
        **_vision_sizes(_VISION_DEFAULTS | vision, file),
        vision_full_attention_blocks=_blocks(vision.get("fullatt_block_indexes", _FULL_ATTENTION_BLOCKS), file),
        # transformers before version 5 wrote it into the text's part.
        tied_embeddings=bool(content.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def _vision_sizes(vision: dict[str, Any], file: Path) -> dict[str, int]:
    sizes = {key: _number(vision, key, file) for key in _VISION_DEFAULTS}
    merge, patch = sizes["spatial_merge_size"], sizes["patch_size"]
    return {
        "vision_depth": sizes["depth"],
        "vision_hidden_size": sizes["hidden_size"],
        "vision_out_hidden_size": sizes["out_hidden_size"],
        "vision_patch_values": sizes["in_channels"] * sizes["temporal_patch_size"] * patch**2,
        "vision_merge_size": merge,
        "vision_window_patches": (sizes["window_size"] // merge // patch * merge) ** 2,
    }


def _blocks(value: Any, file: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(block) is int and block >= 0 for block in value):
        raise UserError(f"'fullatt_block_indexes' is {value!r}, not a list of block numbers", where=str(file), fix=_FIX)
    return tuple(value)


def _number(section: Any, key: str, file: Path) -> int:
    value = section.get(key) if isinstance(section, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"'{key}' is {value!r}, not a positive whole number", where=str(file), fix=_FIX)
    return value
