"""Sequences to micro-batches: as few as fit a budget of tokens, of like cost, with what they share kept together."""

from __future__ import annotations

from collections.abc import Sequence

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.packing import bins_per_rank
from perl_megatron.batching.padded_rows import PaddedRows
from perl_megatron.batching.whole_views import WholeViews
from perl_megatron.batching.work import ViewWork


def plan_micro_batches(
    views: Sequence[ViewWork],
    cost: CostModel,
    *,
    token_budget: int,
    data_size: int,
    stages: int = 1,
    multiple: int = 1,
) -> list[list[tuple[int, ...]]]:
    """Which sequences are in which micro-batch: ``result[data_rank][micro_batch]`` holds their indices.

    Every data-parallel rank has the same number of micro-batches, a multiple of ``multiple`` and at least one (some
    are empty where there is too little). Those of most memory come first: where memory is short, the first micro-batch
    shows it. In a micro-batch the sequences of a view stand together, in their order. A micro-batch above
    ``token_budget`` holds a single sequence, which alone is above it.

    Under full sharing a view stays whole, unless it alone is above the budget: its responses are then divided over the
    fewest parts. Views of common images stay together where they fit and the step (``cost.step_flops``) is not longer
    for it. Otherwise sequences are taken in the order of their views, with views of common images and of like length
    side by side.

    Args:
        views: no sequence is in two of them.
        token_budget: most memory of a micro-batch, as ``CostModel.memory`` measures it.
        stages: pipeline stages. They idle where there are few micro-batches; a smaller budget gives more.
        multiple: the interleaved schedule needs a multiple of the pipeline stages, others of 1.
    """
    assert min(token_budget, data_size, stages, multiple) > 0
    if not views:
        return [[()] * multiple for _ in range(data_size)]
    if cost.sharing == "full":
        plan = WholeViews(views, cost, token_budget).plan(data_size, stages, multiple)
    else:
        plan = PaddedRows(views, cost, token_budget).plan(data_size, multiple)
    number = bins_per_rank(max(map(len, plan)) * data_size, data_size, multiple)
    return [_largest_first(rank, cost) + [()] * (number - len(rank)) for rank in plan]


def most_micro_batches(
    largest: ViewWork, num_views: int, cost: CostModel, *, token_budget: int, data_size: int, multiple: int = 1
) -> int:
    """The most micro-batches of a rank that ``plan_micro_batches`` makes of so many views, none above ``largest``.

    That has the most prompt tokens, responses, tokens of each response and memory of all images together (which may be
    given as one image).
    """
    sequences = len(largest.sequence_indices)
    images = sum(cost.image_memory(patches) for _, patches in largest.images)
    whole = images + cost.view_tokens(largest)
    if cost.sharing != "full":
        # A row ends a run only where the run is as full as rows of the largest size would make it.
        together = max(1, token_budget // (max(largest.row_lengths) + images))
        bins = -(-num_views * sequences // together)
    elif whole <= token_budget:
        # First-fit opens a bin only where the others are that full.
        bins = -(-num_views // (token_budget // whole))
    else:
        room, longest = token_budget - images - largest.prompt_tokens, max(largest.response_tokens) - 1
        together = max(1, room // longest) if longest > 0 else 1
        bins = num_views * -(-sequences // together)
    return bins_per_rank(bins, data_size, multiple)


def _largest_first(rank: Sequence[Sequence[ViewWork]], cost: CostModel) -> list[tuple[int, ...]]:
    ordered = sorted(rank, key=cost.memory, reverse=True)
    return [tuple(index for view in micro_batch for index in view.sequence_indices) for micro_batch in ordered]
