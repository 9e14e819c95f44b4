"""The micro-batches of a pass over mean groups: those that the trainer's own planner makes of them. No torch.

The trainer plans a pass for log-probabilities over all groups of a step at once, and an update over its own groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from perl_megatron.batching.cost import CostModel, Sharing
from perl_megatron.batching.micro_batches import plan_micro_batches
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.architecture import ArchitectureNumbers

Views = tuple[ViewWork, ...]
"""Of a micro-batch; its sequences and images are numbered as they occur, so that equal work is equal."""


@dataclass(frozen=True)
class RankWork:
    """What some data-parallel ranks compute in a pass, each of them."""

    micro_batches: tuple[tuple[Views, int], ...]
    """And how many are alike; without empty ones."""
    num_ranks: int


@dataclass(frozen=True)
class PassPlan:
    """A pass over some questions."""

    ranks: tuple[RankWork, ...]
    num_micro_batches: int
    """Of each rank, empty ones included."""
    view_parts: float
    """Micro-batches that a view is divided over, on average."""
    image_runs: float
    """How often an image of a question is encoded, by patches."""


@lru_cache(maxsize=4096)
def plan_pass(
    numbers: ArchitectureNumbers,
    group: Views,
    questions: int,
    *,
    sharing: Sharing,
    vision_backward: bool,
    token_budget: int,
    data_size: int,
    stages: int,
    multiple: int,
) -> PassPlan:
    """The plan of so many equal groups, no two of which share an image; as ``BatchLayout.plan``, on all ranks.

    Kept, as a search asks for the same again and again.
    """
    cost = CostModel(numbers, sharing, vision_backward=vision_backward)
    views = mean_views(group, questions)
    plan = plan_micro_batches(
        views, cost, token_budget=token_budget, data_size=data_size, stages=stages, multiple=multiple
    )
    places = {
        index: (position, member)
        for position, view in enumerate(views)
        for member, index in enumerate(view.sequence_indices)
    }
    # Ranks in the order of their first, micro-batches likewise.
    ranks = Counter(
        tuple(Counter(_numbered(views, [places[index] for index in indices]) for indices in rank if indices).items())
        for rank in plan
    )
    parts = patches = 0
    for rank, num_ranks in ranks.items():
        for micro_batch, count in rank:
            parts += num_ranks * count * len(micro_batch)
            patches += num_ranks * count * sum(cost.encoded_images(micro_batch))
    distinct = questions * sum(dict(image for view in group for image in view.images).values())
    return PassPlan(
        ranks=tuple(RankWork(rank, num_ranks) for rank, num_ranks in ranks.items()),
        num_micro_batches=len(plan[0]),
        view_parts=parts / len(views),
        image_runs=patches / distinct if distinct else 0.0,
    )


def mean_views(group: Views, questions: int) -> list[ViewWork]:
    """The views of so many groups like this one, each with images and sequences of its own."""
    size = sum(len(view.sequence_indices) for view in group)
    return [
        ViewWork(
            tuple(question * size + index for index in view.sequence_indices),
            view.prompt_tokens,
            view.response_tokens,
            tuple((f"{question}: {key}", patches) for key, patches in view.images),
        )
        for question in range(questions)
        for view in group
    ]


def _numbered(views: Sequence[ViewWork], places: Iterable[tuple[int, int]]) -> Views:
    """The (position, member)s of views, without what tells one question from another."""
    members: dict[int, list[int]] = {}
    for position, member in places:
        members.setdefault(position, []).append(member)
    keys: dict[str, str] = {}
    found: list[ViewWork] = []
    start = 0
    for position, chosen in members.items():
        part = views[position].part(chosen)
        images = tuple((keys.setdefault(key, str(len(keys))), patches) for key, patches in part.images)
        indices = tuple(range(start, start + len(chosen)))
        found.append(ViewWork(indices, part.prompt_tokens, part.response_tokens, images))
        start += len(chosen)
    return tuple(found)
