"""The nouns of permuted GRPO (PeRL, arXiv 2506.14907). No torch: a login node can import this file.

``order`` everywhere means: ``order[new_slot] = old_slot`` (0-based), so a view's images are
``[record.images[old] for old in order]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a record's text once for each image, in slot order."""


class ReferenceRule(str, Enum):
    """How a record's text names its images, and so what has to follow when they move."""

    INDEX = "index"
    """'image 2', 'Image 2', 'figure 2', 'picture two': a 1-based number."""
    ORDINAL = "ordinal"
    """'the second image', 'the last image'."""
    POSITION = "position"
    """'the left image', 'the picture on the right', 'the middle image': of two or three images side by side."""
    LETTER = "letter"
    """'image B': the B-th image, or the image of option B where the options are images."""
    OPTION_TEXT = "option_text"
    """An option whose whole text names images: '(A) 2, 1, 3', '(B) left'; read by the other kinds and as numbers."""


class AnswerRule(str, Enum):
    """How a record's answer follows when its images move (the Λ of PeRL's Eq. 1)."""

    UNCHANGED = "unchanged"
    """The answer does not depend on the order (S = 1 in Eq. 1), or the text's references follow the images."""
    OPTION_LETTER = "option_letter"
    """The answer is the letter of an option that stands for an image slot (``PermutationContract.option_slots``)."""
    ORDERING = "ordering"
    """The answer is a list of 1-based image numbers, such as '3, 1, 2'."""
    INDEX = "index"
    """The answer is one 1-based image number."""
    REFERENCES = "references"
    """The answer is a text that names images, such as 'the second image' or 'left'; it follows as the question does."""
    NOT_PERMUTABLE = "not_permutable"
    """No rule is known to hold: the record is never permuted (``PermutationContract.reason`` says why)."""


@dataclass(frozen=True)
class PermutationContract:
    """Which image slots of a record may move, how its text follows, and how its answer transforms."""

    movable: tuple[int, ...] = ()
    """0-based slots that may trade places; fewer than two means that the record is never permuted."""
    references: tuple[ReferenceRule, ...] = ()
    """The kinds of reference in the text that are rewritten to follow the images."""
    answer: AnswerRule = AnswerRule.UNCHANGED
    option_slots: tuple[int | None, ...] = ()
    """For ``OPTION_LETTER``: the slot that option A, B, … stands for; None for an option that is not an image."""
    reason: str = ""
    """For ``NOT_PERMUTABLE``: why, for reports."""

    @property
    def permutable(self) -> bool:
        """Whether at least two images can trade places."""
        return len(self.movable) >= 2 and self.answer is not AnswerRule.NOT_PERMUTABLE


@dataclass(frozen=True)
class Grading:
    """What decides, besides its type, whether an answer is right."""

    options: tuple[str, ...] = ()
    """The texts of the options A, B, …, without their letters; an answer may name an option by its text."""
    absolute_tolerance: float = 0.0
    """A number may be this far from the expected one."""
    relative_tolerance: float = 0.0
    """A number may be this far from the expected one, as a share of the expected one."""
    unit: str = ""
    """The unit that a number is expected in; an answer may leave it out. '' where there is none."""


@dataclass(frozen=True)
class Record:
    """One question over one or more images (or none)."""

    id: str
    images: tuple[Path, ...]
    text: str
    """The question, with one ``<image>`` placeholder for each image, in slot order."""
    answer: str
    answer_type: str = "text"
    """How the answer is graded: 'choice', 'number', 'index', 'ordering', 'math', 'text', 'short_text' or 'json'."""
    contract: PermutationContract = PermutationContract()
    demonstration: str | None = None
    """A response to imitate in supervised training; None where the record has none."""
    kind: str = ""
    """The question kind, for reports."""
    source: str = ""
    """The dataset file and line that the record came from, for error messages."""
    grading: Grading = Grading()


@dataclass(frozen=True)
class View:
    """A record in one image order, with text and answer already adapted. View 0 is the identity."""

    record_id: str
    index: int
    """0 for the original order; 1 … n_s for the copies."""
    order: tuple[int, ...]
    images: tuple[Path, ...]
    text: str
    answer: str
    answer_type: str
    kind: str = ""
    grading: Grading = Grading()
    """As in the record, with the options' texts as this view shows them."""
    option_slots: tuple[int | None, ...] = ()
    """The slot that option A, B, … stands for, in this view as in all others; None for one that is not an image."""

    @property
    def permuted(self) -> bool:
        """Whether the images stand in another order than the record's."""
        return self.order != tuple(range(len(self.order)))


@dataclass(frozen=True)
class EncodedPrompt:
    """A view as the model reads it. P prompt tokens, I images."""

    token_ids: np.ndarray
    """int64 [P]; an image is as many image-pad ids as it has merged patches."""
    compact_ids: tuple[int, ...]
    """The same with a single image-pad id for each image: what vLLM takes and expands itself."""
    image_starts: tuple[int, ...]
    """For each image, the index in ``token_ids`` of its first image-pad id."""
    grids: np.ndarray
    """int64 [I, 3]: (time, height, width) in 14-pixel patches; an image has t·h·w / 4 image-pad ids."""
    image_keys: tuple[str, ...]
    """For each image the content hash of its resized pixels: equal images have equal keys."""


@dataclass
class Rollout:
    """One sampled response to a view. R response tokens. Fields are filled in one after another, never overwritten."""

    view_index: int
    token_ids: np.ndarray
    """int64 [R], the end-of-turn token included where the model produced it."""
    logprob_rollout: np.ndarray
    """float32 [R]: the engine's log-probability of each token under the sampling distribution."""
    finish_reason: str
    """'stop' (the model ended its turn) or 'length' (cut at the token limit)."""
    text: str
    weight_versions: np.ndarray
    """int64 [R]: the version of the weights that sampled each token."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    reward: float | None = None
    logprob_old: np.ndarray | None = None
    """float32 [R]: the trainer's log-probability before the step's first update (π_old); None if not computed."""
    logprob_ref: np.ndarray | None = None
    """float32 [R]: the reference policy's log-probability (π_ref)."""
    importance: np.ndarray | None = None
    """float64 [R]: bounded weights π_old / π_rollout of the policy loss; None without such a correction."""
    kl_penalty: float | None = None
    """β · Σ_t KL_t of the response, taken off the reward before the advantage; None where the loss has the KL term."""
    advantage: float | None = None
    readable: bool = True
    """Whether the response holds an answer that can be graded."""

    @property
    def correctness(self) -> float:
        """How right the answer is, from 0 to 1: by the judge where there is one, else by the rules (accuracy)."""
        return self.reward_parts.get("judge", self.reward_parts["accuracy"])


@dataclass
class Group:
    """All rollouts of all views of one record in one step: the unit of filtering and batching."""

    record: Record
    views: tuple[View, ...]
    prompts: tuple[EncodedPrompt, ...]
    """One for each view."""
    rollouts: list[Rollout]

    def rewards(self) -> np.ndarray:
        """float64 [(n_s + 1) · n], in the order of ``rollouts``."""
        missing = [index for index, rollout in enumerate(self.rollouts) if rollout.reward is None]
        assert not missing, f"rollouts {missing} of {self.record.id} have no reward yet"
        return np.array([rollout.reward for rollout in self.rollouts], dtype=np.float64)

    def penalized_rewards(self) -> np.ndarray:
        """float64 [(n_s + 1) · n]: ``rewards`` less the KL penalties, where there are any."""
        return self.rewards() - [rollout.kl_penalty or 0.0 for rollout in self.rollouts]
