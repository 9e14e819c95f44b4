"""The words of a verdict: causes, findings, and what was tested."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cause(str, Enum):
    """Where a mismatch comes from."""

    TOKEN_IDS = "token ids"
    PIXELS = "pixels"
    POSITIONS = "mRoPE positions"
    WEIGHTS = "weights"
    KERNELS = "kernels"
    UNEXPLAINED = "unexplained"


ADVICE = {
    Cause.TOKEN_IDS: "compare the token ids that it is given with prompt_token_ids of the dump, one by one",
    Cause.PIXELS: "compare the pixels that it is given, and their order, with the images beside the dump",
    Cause.POSITIONS: "compare its (time, height, width) positions with transformers' get_rope_index",
    Cause.WEIGHTS: "look at what sends it its weights: update_weights, rollout.attestation=full, `verify-weights`",
    Cause.KERNELS: "look for a lower precision: its dtype, its attention and loss kernels, a quantized or 8-bit path",
    Cause.UNEXPLAINED: "start where the gap begins (below); other weights can be named with --other-policy",
}
"""What to do next, by cause."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with the records themselves."""

    cause: Cause
    text: str


@dataclass(frozen=True)
class Tested:
    """One hypothesis against one party's log-probabilities."""

    cause: Cause | None
    """None: the hypothesis that nothing is wrong."""
    name: str
    largest: float
    """Largest |party − reference| of a token, over the rollouts that it was tested on."""
    mean: float
    num_rollouts: int
    """On so many it was tested and says something else than that nothing is wrong."""
    explained: int
    """Rollouts that do not agree with the right input, and do with this."""
    broken: int
    """Rollouts that agree with the right input, and do not with this."""

    @property
    def rank(self) -> tuple[int, int]:
        """The smaller, the better; equal for hypotheses that cannot be told apart."""
        return -self.explained, self.broken


@dataclass(frozen=True)
class Verdict:
    """On one party: the engine or the trainer."""

    party: str
    policy: str
    """The weights that it should have had."""
    precision: str
    """The precision that it should compute in."""
    causes: tuple[Cause, ...]
    """None: it agrees with the reference; several: they cannot be told apart."""
    winners: tuple[Tested, ...]
    """The hypotheses that explain the mismatch, as good as each other."""
    tested: tuple[Tested, ...]
    """All, that nothing is wrong first, then the best first."""
    num_rollouts: int
    num_mismatched: int
    tolerances: tuple[float, float]
    """Of the largest gap, and of the mean over all tokens."""
    where: str
    """Where the gap begins, in words; empty without a mismatch."""

    @property
    def plain(self) -> Tested:
        """The hypothesis that nothing is wrong."""
        return self.tested[0]
