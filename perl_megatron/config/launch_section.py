"""The section of the launch: on which machines the processes of a run are started, and how it ends there."""

from __future__ import annotations

from pydantic import Field

from perl_megatron.config.section import Section


class LaunchConfig(Section):
    """How the processes of a run are started, and how they end."""

    grace_seconds: float = Field(default=120.0, gt=0)
    """Seconds between the signal that ends a run (SIGTERM, SIGUSR1) and the end of its machine: the step is finished if
    that fits, otherwise its groups are kept for the resumed run, and there is a checkpoint. A Slurm job gets the signal
    that long before its time is over."""
