"""What a computation keeps in memory at its peak, counted exactly: by tensors, not by pages."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are alive at once, at their peak; ``besides``: not these."""

    def __init__(self, besides: Sequence[Tensor] = ()):
        super().__init__()
        self.peak = 0
        self._besides = {each.untyped_storage()._cdata for each in besides}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(each):
                self._watch(each.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._besides:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))
