"""Small checkpoints of random bits, by the project's own tool; an untied model in bfloat16, vocabulary of odd size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from perl_megatron.checkpoint.conversion import Conversion, Format
from perl_megatron.checkpoint.convert import plan_conversion
from perl_megatron.checkpoint.open_weights import open_weights

TOOLS = Path(__file__).parents[1] / "tools"
SMALL = Path(__file__).parents[1] / "benchmarks" / "small_model"
MAX_FILE_BYTES = 400_000


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


def assert_same_bits(path: Path, expected: Path) -> None:
    """Both folders hold the same tensors, in whatever format."""
    weights, others = open_weights(path), open_weights(expected)
    assert set(weights) == set(others)
    assert all(torch.equal(weights[n].view(torch.uint8), others[n].view(torch.uint8)) for n in others)


def conversion(source: Path, target: Path, to: Format = "torch_dist", **options: Any) -> Conversion:
    """A plan that cuts the small model into about ten files."""
    return plan_conversion(source, target, to=to, **({"max_file_bytes": MAX_FILE_BYTES} | options))


def make_random_checkpoint(folder: Path) -> Path:
    """A Hugging Face folder with a tokenizer's and a generation config's file beside the weights."""
    tool("make_random_weights").make_random_weights(folder, SMALL)
    (folder / "tokenizer.json").write_text('{"words": []}')
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
