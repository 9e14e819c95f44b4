"""Write a Qwen2.5-VL with random weights: `python tools/make_random_weights.py OUT [--config FOLDER] [--seed 0]`.

One tensor is in memory at a time, so that true shapes (the 3B's: 7.5 GB in bfloat16) fit on any machine. There is no
tokenizer: the folder is for conversions and their benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from perl_megatron.checkpoint.hf_files import save_checkpoint
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture

THREE_B = Path(__file__).resolve().parents[1] / "examples" / "qwen2_5_vl" / "3b"
_EXPONENT, _LOWEST_OF_EXPONENT = 0x7F80, 0x80
_CHUNK = 1 << 22


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """bfloat16 with random bits, infinities and NaN left out; every tensor is another."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        bits = torch.empty(shape, dtype=torch.int16).random_(-(2**15), 2**15, generator=generator)
        for part in bits.view(-1).split(_CHUNK):
            all_ones = part.bitwise_and(_EXPONENT) == _EXPONENT
            part.sub_(all_ones.to(torch.int16) * _LOWEST_OF_EXPONENT)
        yield name, bits.view(torch.bfloat16)


def make_random_weights(target: Path, config: Path, *, seed: int = 0) -> int:
    """Write the folder with the shapes of ``config``'s config.json; returns the bytes of its tensors.

    ``config`` is a folder or the file itself. What else belongs to a model goes along from there.
    """
    folder = config.parent if config.name == "config.json" else config
    shapes = published_shapes(read_architecture(folder))
    save_checkpoint(target, random_weights(shapes, seed), folder)
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--config", type=Path, default=THREE_B, help="config.json or its folder (default: the 3B's)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        nbytes = make_random_weights(options.target, options.config, seed=options.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.target}: {nbytes:,} bytes")


if __name__ == "__main__":
    main()
