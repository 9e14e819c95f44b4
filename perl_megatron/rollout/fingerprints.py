"""Whether what a server received is what the trainer sent: both ends take the same checksums of the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from perl_megatron.rollout.attestation import SAMPLED_COLUMNS
from perl_megatron.rollout.digest import as_matrix, checksum
from perl_megatron.runtime.rng import derive_seed


class Fingerprints:
    """Of the published tensors of one weight update, by name.

    Args:
        version: of the weights; it chooses the columns.
        full: take all numbers; else ``SAMPLED_COLUMNS`` columns of each tensor, which hold a number of every row.
    """

    def __init__(self, *, version: int, full: bool):
        self._version, self._full = version, full
        self.values: dict[str, int] = {}

    def see(self, name: str, tensor: Tensor) -> None:
        """Take those of a tensor, in the engine's dtype."""
        matrix = as_matrix(tensor)
        if not self._full:
            columns = [derive_seed(self._version, name, index) for index in range(SAMPLED_COLUMNS)]
            picked = torch.tensor([column % matrix.shape[1] for column in columns], device=matrix.device)
            matrix = matrix.index_select(1, picked)
        self.values[name] = checksum(matrix)

    def differences(self, others: dict[str, int]) -> list[str]:
        """The tensors that the other end saw otherwise, or not at all, in words."""
        names = sorted(self.values.keys() | others.keys())
        different = [name for name in names if self.values.get(name) != others.get(name)]
        return [f"{name}: it did not arrive as it was sent" for name in different]
