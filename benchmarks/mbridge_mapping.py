"""mbridge's mapping of single tensors: the part of it that works without TransformerEngine. It cannot build a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from perl_megatron.runtime import platform

platform.install()  # before mbridge imports megatron-core

from mbridge.models.qwen2_5_vl import Qwen2_5VLBridge  # noqa: E402

from perl_megatron.checkpoint.open_weights import open_weights  # noqa: E402
from perl_megatron.checkpoint.qwen25_vl_table import Entry, fused_megatron_name, table  # noqa: E402
from perl_megatron.model.architecture import read_architecture  # noqa: E402

Parts = tuple[torch.Tensor, ...]


class Ours:
    """The table's operations, for one tensor-parallel rank."""

    def to_megatron(self, entry: Entry, parts: Parts) -> torch.Tensor:
        """Published tensors → Megatron's parameter."""
        return entry.op.split(parts, 0, 1)

    def to_published(self, entry: Entry, weight: torch.Tensor) -> Parts:
        """The way back."""
        return entry.op.join([weight])


class MBridge:
    """The same by mbridge. Its constructor wants process groups; the mapping only looks at the model's config."""

    def __init__(self, folder: Path):
        # transformers 5 nests the language model's numbers, mbridge reads them flat, as config.json has them.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["vision_config"] = SimpleNamespace(**config["vision_config"])
        self._bridge: Any = Qwen2_5VLBridge.__new__(Qwen2_5VLBridge)
        self._bridge.hf_config = SimpleNamespace(**config)
        self._bridge.make_vocab_size_divisible_by = None

    @staticmethod
    def _name(entry: Entry) -> str:
        return fused_megatron_name(entry.megatron).replace("patch_embed.weight", "patch_embed.proj.weight")

    def to_megatron(self, entry: Entry, parts: Parts) -> torch.Tensor:
        """Published tensors → Megatron's parameter."""
        assert tuple(self._bridge._weight_name_mapping_mcore_to_hf(self._name(entry))) == entry.published
        weight: torch.Tensor = self._bridge._weight_to_mcore_format(self._name(entry), list(parts))
        return weight

    def to_published(self, entry: Entry, weight: torch.Tensor) -> Parts:
        """The way back."""
        names, parts = self._bridge._weight_to_hf_format(self._name(entry), weight)
        assert tuple(names) == entry.published
        return tuple(parts)


def map_all(name: str, folder: Path) -> dict[str, float]:
    """Seconds for all tensors of a Hugging Face folder, there and back in memory; reading them is not counted.

    Every tensor must come back bit for bit, and mbridge's parameter must be ours.
    """
    weights, ours = open_weights(folder), Ours()
    mapping = ours if name == "ours" else MBridge(folder)
    seconds = 0.0
    for entry in table(read_architecture(folder)):
        parts = tuple(weights[published] for published in entry.published)
        begin = time.perf_counter()
        weight = mapping.to_megatron(entry, parts)
        back = mapping.to_published(entry, weight)
        seconds += time.perf_counter() - begin
        assert all(map(_same_bits, back, parts)), entry.published
        if mapping is not ours:
            assert _same_bits(weight.flatten(), ours.to_megatron(entry, parts).flatten()), entry.megatron
    return {"mapping_seconds": seconds}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.int16), other.view(torch.int16))
