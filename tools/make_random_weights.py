"""Write a Qwen2.5-VL with random weights: `python tools/make_random_weights.py OUT [--shape 3b] [--seed 0]`.

One tensor is in memory at a time, so that the true shapes (3b: 7.5 GB in bfloat16) fit on any machine. There is no
tokenizer: the folder is for conversions and their benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from perl_megatron.checkpoint.hf_files import save_checkpoint
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture

SHAPES: dict[str, dict[str, Any]] = {
    # As Qwen/Qwen2.5-VL-3B-Instruct publishes it.
    "3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    },
    "small": {
        "vocab_size": 1001,
        "hidden_size": 192,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {"depth": 2, "hidden_size": 80, "intermediate_size": 124, "num_heads": 4},
    },
}


def make_config(shape: dict[str, Any]) -> dict[str, Any]:
    """config.json in the published flat layout."""
    depth = shape["vision_config"]["depth"]
    vision = {
        **shape["vision_config"],
        "model_type": "qwen2_5_vl",
        "out_hidden_size": shape["hidden_size"],
        "hidden_act": "silu",
        "in_chans": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(depth // 4 - 1 if depth >= 4 else 0, depth, max(1, depth // 4))),
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{key: value for key, value in shape.items() if key != "vision_config"},
        "vision_config": vision,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """bfloat16 with random bits, infinities and NaN left out; every tensor is another."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        bits = torch.empty(shape, dtype=torch.int16).random_(-(2**15), 2**15, generator=generator)
        # Clearing the exponent's lowest bit leaves no exponent of all ones.
        yield name, bits.bitwise_and_(~0x80).view(torch.bfloat16)


def make_random_weights(target: Path, shape: str, *, seed: int = 0) -> int:
    """Write the folder; returns the bytes of its tensors."""
    source = target.with_name(f".{target.name}.config")
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text(json.dumps(make_config(SHAPES[shape]), indent=2) + "\n")
    try:
        shapes = published_shapes(read_architecture(source))
        save_checkpoint(target, random_weights(shapes, seed), source)
    finally:
        (source / "config.json").unlink()
        source.rmdir()
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="(default: 3b)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        nbytes = make_random_weights(options.target, options.shape, seed=options.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.target}: {nbytes:,} bytes")


if __name__ == "__main__":
    main()
