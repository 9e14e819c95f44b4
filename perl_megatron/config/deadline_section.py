"""The section of the deadlines: how long each phase of a run may take before the job is ended."""

from __future__ import annotations

from pydantic import Field

from perl_megatron.config.section import Section

_MARGIN = 120.0
"""Seconds by which collectives wait longer than any phase may: a phase's end says more than a collective's."""


class DeadlinesConfig(Section):
    """Seconds that one phase may take, on any rank; then the stacks of all ranks are shown, and the job ends."""

    start: float = Field(default=3600.0, gt=0)
    """From the process's start to the first step: reading the data, the weights, a checkpoint; starting the engine."""
    data: float = Field(default=1800.0, gt=0)
    """Drawing questions, and decoding the images of those that are drawn together."""
    generate: float = Field(default=7200.0, gt=0)
    """All sampling of one step, refills, rewards and reading of data included; in `eval`, that of one chunk."""
    reward: float = Field(default=3600.0, gt=0)
    """Scoring the rollouts that are drawn together; a judge that is asked again and again takes its time."""
    sync: float = Field(default=1800.0, gt=0)
    """Bringing the weights into the engine, and waking it; or putting it to sleep."""
    log_probs: float = Field(default=3600.0, gt=0)
    """The forward passes of one step: the policy's log-probabilities and the reference's."""
    update: float = Field(default=3600.0, gt=0)
    """The forward and backward passes of one step, all its updates."""
    save: float = Field(default=1800.0, gt=0)
    """Copying a checkpoint, waiting for the one before, and at the end of the run writing it."""
    evaluate: float = Field(default=14400.0, gt=0)
    """One evaluation on the held-out questions; in `eval`, what lies between two chunks."""
    export: float = Field(default=3600.0, gt=0)
    """Writing the final policy."""
    between: float = Field(default=1800.0, gt=0)
    """From the end of one of these to the beginning of the next: writing logs, agreeing on whether to stop."""

    @property
    def collective_timeout(self) -> float:
        """Seconds that a collective waits: longer than any phase may take."""
        return max(self.of_phases().values()) + _MARGIN

    def of_phases(self) -> dict[str, float]:
        """Phase → its deadline."""
        return {name: getattr(self, name) for name in DeadlinesConfig.model_fields}
