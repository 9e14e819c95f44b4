"""What a rank needs of its machine's memory, beside its device. No torch.

    process + reference policy + the most of
      training: the weights of an engine that sleeps, and the copy of what the rank writes of a checkpoint
      resuming: the whole optimizer states of its model part, read from a checkpoint and cut to the rank's own

The states of a distributed optimizer are copied twice, into the layout of its buffers and by parameters; the second
copy stays until it is written. What replicas have alike, they share out evenly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from perl_megatron.plan.activations import SINGLE


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a rank."""

    process: float
    """0 on a CPU, where it is part of the plan of the device."""
    reference: float
    engine: float
    """Of one that sleeps."""
    checkpoint: float
    resume: float

    @property
    def peak(self) -> float:
        """All that is there at once, at most."""
        return self.process + self.reference + max(self.engine + self.checkpoint, self.resume)

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        return {**asdict(self), "peak": self.peak}


def host_memory(
    *,
    num_parameters: int,
    num_trained: int,
    num_joined: int,
    wide: int,
    replicas: int,
    distributed: bool,
    has_reference: bool,
    process: float,
    engine: float,
) -> HostMemory:
    """Of a rank with so many parameters, of ``wide`` bytes each, that ``replicas`` ranks hold.

    ``num_joined``: numbers of the trained gate and up matrices, which lie apart in a checkpoint, so that they are
    joined in new memory when it is read. ``distributed``: whether the optimizer is. Its checkpoints hold a float32 copy
    of the parameters, those of others only where the parameters are not float32 themselves.
    """
    copies = 2 if distributed else 1
    of_number = SINGLE * (3 if distributed or wide < SINGLE else 2)
    states = of_number * num_trained
    return HostMemory(
        process=process,
        reference=num_parameters * wide if has_reference else 0,
        engine=engine,
        checkpoint=(copies * states + wide * num_parameters) / replicas,
        resume=states + of_number * num_joined,
    )
