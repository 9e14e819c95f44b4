"""Small checkpoints of random bits, by the project's own tool; an untied model in bfloat16, vocabulary of odd size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> ModuleType:
    """tools/NAME.py as a module."""
    key = f"tools_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def make_random_checkpoint(folder: Path) -> Path:
    """A Hugging Face folder with a tokenizer's and a generation config's file beside the weights."""
    tool("make_random_weights").make_random_weights(folder, "small")
    (folder / "tokenizer.json").write_text('{"words": []}')
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
