"""The reference policy π_ref: the weights that training started from, lent to the model for one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferenceWeights:
    """A copy, in host memory, of this rank's share of the parameters as they are now."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        self._held = [parameter.detach().cpu().clone() for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the reference's weights; afterwards exactly, bit for bit, those that it had.

        The two are exchanged one parameter at a time, so that no second model is needed on the device.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, held in zip(self._parameters, self._held, strict=True):
            current = parameter.detach().to("cpu", copy=True)
            parameter.copy_(held)
            held.copy_(current)
