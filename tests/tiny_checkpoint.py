"""A tiny checkpoint, images and views for tests: made by the project's own tool, deterministic."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from perl_megatron.types import IMAGE_PLACEHOLDER, View

TOOL = Path(__file__).parents[1] / "tools" / "make_tiny_policy.py"


def tool() -> ModuleType:
    """tools/make_tiny_policy.py as a module."""
    if "make_tiny_policy" not in sys.modules:
        spec = importlib.util.spec_from_file_location("make_tiny_policy", TOOL)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_tiny_policy"] = module
        spec.loader.exec_module(module)
    return sys.modules["make_tiny_policy"]


def make_policy(target: Path, *, seed: int = 0, scale: float = 1.0, **shape: int | bool | float) -> Path:
    """A tiny policy; ``scale`` widens its matrices, so that its distributions are not nearly flat."""
    tool().make_tiny_policy(target, tool().TinyShape(**shape), seed=seed)
    if scale != 1.0:
        from safetensors.torch import load_file, save_file

        file = target / "model.safetensors"
        weights = {name: tensor * scale if tensor.ndim >= 2 else tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return target


def make_images(directory: Path, sizes: Sequence[tuple[int, int]], *, seed: int = 0) -> list[Path]:
    """One random RGB PNG for each (height, width)."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for index, (height, width) in enumerate(sizes):
        path = directory / f"{seed}-{index}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def make_view(images: Sequence[Path], *, question: str = "Which digit is in image 1?", index: int = 0) -> View:
    """A view in the identity order: 'Image 1: <image> … question'."""
    named = [f"Image {slot + 1}: {IMAGE_PLACEHOLDER} " for slot in range(len(images))]
    return View("record", index, tuple(range(len(images))), tuple(images), "".join(named) + question, "7", "number")
