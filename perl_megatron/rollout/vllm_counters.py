"""What a vLLM in this process computed: its own counter of cached prompt tokens, and the images that its tower saw."""

from __future__ import annotations

from typing import Any

from torch import nn


class VllmCounters:
    """Counts from where it was made, or last asked.

    Args:
        llm: a ``vllm.LLM`` that keeps statistics (``disable_log_stats=False``).
        model: its model in this process.
    """

    def __init__(self, llm: Any, model: nn.Module):
        self._llm = llm
        self._cached_before = self._cached_tokens()
        self._counter = ImageCounter(model)
        self._images_before = 0

    def take(self) -> tuple[int, int]:
        """(prompt tokens found in the prefix cache, images that the vision tower encoded) since the last call."""
        cached = self._cached_tokens()
        images = self._counter.num_images
        result = cached - self._cached_before, images - self._images_before
        self._cached_before, self._images_before = cached, images
        return result

    def _cached_tokens(self) -> int:
        values = [metric.value for metric in self._llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
        return int(sum(values))


class ImageCounter:
    """Counts the images that a model's vision tower encodes in this process."""

    def __init__(self, model: nn.Module):
        self.num_images = 0
        model.get_submodule("visual").register_forward_hook(self._count, with_kwargs=True)

    def _count(self, tower: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        del tower, output
        grids = options["grid_thw"] if "grid_thw" in options else arguments[1]
        # With CUDA graphs of the tower (not vLLM's default) images come without grids and are not counted.
        self.num_images += 0 if grids is None else len(grids)
