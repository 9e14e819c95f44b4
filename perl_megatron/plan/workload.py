"""The work that a plan counts on: the mean group of a step, and the largest micro-batches that can occur. No torch.

A micro-batch is bounded by `actor.micro_batch_tokens`, which counts a patch by the share of a language token's memory
that it takes. What it holds of both can differ: a micro-batch with as many image tokens as prompts can have needs the
most memory on the first pipeline stage, one of text alone needs the most on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.micro_batches import most_micro_batches
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.layout import length_multiple, micro_batch_multiple
from perl_megatron.config.schema import Config
from perl_megatron.plan.assumptions import Assumptions

VALUES_OF_PIXEL = 6
"""Of a patch: three channels, two frames."""


@dataclass(frozen=True)
class MicroBatchSize:
    """What of a micro-batch decides its memory, over all context ranks together."""

    tokens: int
    """Of the row, or rows, that the language model runs; padding included."""
    outputs: int
    """Response tokens that are predicted."""
    patches: int = 0
    """Of the images that are encoded."""
    image_tokens: int = 0
    """Places that their features go to."""
    response_keys: int = 0
    """Keys that are gathered for the responses of shared prompts: prompt and own tokens, for each response."""
    prompt_tokens: int = 0
    """Tokens of shared prompts."""

    def scaled(self, factor: float) -> MicroBatchSize:
        """So many times as much."""
        values = {name: round(factor * value) for name, value in self.__dict__.items()}
        return MicroBatchSize(**values)


def size_of(views: Sequence[ViewWork], cost: CostModel, *, multiple: int = 1) -> MicroBatchSize:
    """The size of a micro-batch of these views; ``multiple`` as ``layout.length_multiple``."""
    responses = [(view.prompt_tokens, tokens) for view in views for tokens in view.response_tokens]
    outputs, cells = sum(tokens for _, tokens in responses), cost.patches_of_a_token
    patches = sum(cost.encoded_images(views))
    if cost.sharing == "full":
        tokens = sum(cost.view_tokens(view) for view in views)
        return MicroBatchSize(
            tokens=-(-tokens // multiple) * multiple,
            outputs=outputs,
            patches=patches,
            image_tokens=sum(count for view in views for _, count in view.images) // cells,
            response_keys=sum(prompt + own - 1 for prompt, own in responses if own > 1),
            prompt_tokens=sum(view.prompt_tokens for view in views),
        )
    longest = max((prompt + own for prompt, own in responses), default=1)
    return MicroBatchSize(
        tokens=len(responses) * -(-longest // multiple) * multiple,
        outputs=outputs,
        patches=patches,
        image_tokens=sum(count * len(view.response_tokens) for view in views for _, count in view.images) // cells,
    )


@dataclass(frozen=True)
class Workload:
    """Of a step of training."""

    group: tuple[ViewWork, ...]
    """The mean group of a question, as the loss sees it."""
    prompt_tokens: int
    response_tokens: int
    """Means."""
    view_memory: int
    """Of a view of the mean group, as `actor.micro_batch_tokens` measures it."""
    group_memory: int
    """Of the mean group."""
    largest_view_memory: int
    """Of the largest view that the config allows."""
    most_micro_batches: int
    """Of each data-parallel rank in an update of the longest."""
    with_images: MicroBatchSize
    """The largest micro-batch of prompts that are images throughout."""
    text_only: MicroBatchSize
    """The largest micro-batch without images."""


def make_workload(config: Config, derived: Derived, numbers: ArchitectureNumbers, assumptions: Assumptions) -> Workload:
    """What the config's bounds and the assumptions come to."""
    data, rollout = config.data, config.rollout
    prompt = max(1, round(assumptions.prompt_share * data.max_prompt_tokens))
    response = max(1, round(assumptions.response_share * rollout.max_response_tokens))
    cost = CostModel(numbers, config.actor.sharing)
    share_prompt = config.algorithm.loss_view == "original"
    views = 1 if share_prompt else derived.views_per_question
    responses = derived.group_size // views
    cells = numbers.vision_merge_size**2
    images = _mean_images(config, numbers, assumptions, round(assumptions.image_share * prompt))
    group = tuple(
        ViewWork(tuple(range(view * responses, (view + 1) * responses)), prompt, (response,) * responses, images)
        for view in range(views)
    )
    largest = _largest_view(config, derived, responses, cells)
    most = derived.questions_per_update * views
    return Workload(
        group=group,
        prompt_tokens=prompt,
        response_tokens=response,
        view_memory=cost.memory(group[:1]),
        group_memory=cost.memory(group),
        largest_view_memory=cost.memory([largest]),
        most_micro_batches=longest_update(config, derived, numbers),
        with_images=_largest(largest, most, cost, config),
        text_only=_largest(replace(largest, images=()), most, cost, config),
    )


def largest_image(config: Config, numbers: ArchitectureNumbers) -> int:
    """Patches of the largest image that the config allows: by data.max_pixels, and by the length of a prompt."""
    cell = numbers.vision_merge_size**2
    fits = cell * config.data.max_prompt_tokens
    if config.data.max_pixels is None:
        return fits
    pixels_of_cell = cell * numbers.vision_patch_values // VALUES_OF_PIXEL
    return min(fits, cell * max(1, config.data.max_pixels // pixels_of_cell))


def most_patches(patches: float, image: int, ranks: int) -> float:
    """Of ``patches`` in images of at most ``image``, which are dealt whole: those of the rank with most."""
    images = max(1, math.ceil(patches / image))
    return patches * math.ceil(images / ranks) / images


def _mean_images(
    config: Config, numbers: ArchitectureNumbers, assumptions: Assumptions, tokens: int
) -> tuple[tuple[str, int], ...]:
    """(name, patches) of the images of a question that have so many tokens together: of equal size, few and large."""
    cell = numbers.vision_merge_size**2
    of_image = max(1, round(assumptions.image_size_share * largest_image(config, numbers)) // cell)
    number = math.ceil(tokens / of_image)
    return tuple((f"image {index}", cell * (tokens // number + (index < tokens % number))) for index in range(number))


def longest_update(config: Config, derived: Derived, architecture: ArchitectureNumbers) -> int:
    """Micro-batches of a data-parallel rank in an update where every prompt and response is as long as it may be.

    No two questions of it are equal: their responses would share a prompt.
    """
    # Conditioned on view 0's prompt, all responses of a group share it.
    share_prompt = config.algorithm.loss_view == "original" and derived.rollouts_per_step > 0
    data, num_rollouts = config.data, derived.group_size if share_prompt else derived.rollouts_per_view
    responses = (derived.max_sequence_tokens - data.max_prompt_tokens,) * num_rollouts
    # An image-pad token is a merged cell of patches, so the prompt's length bounds all images together.
    images = (("all", architecture.vision_merge_size**2 * data.max_prompt_tokens),)
    return most_micro_batches(
        ViewWork(tuple(range(num_rollouts)), data.max_prompt_tokens, responses, images),
        derived.sequences_per_update // num_rollouts,
        CostModel(architecture, config.actor.sharing),
        token_budget=config.actor.micro_batch_tokens,
        data_size=derived.data_size,
        multiple=micro_batch_multiple(config.parallel),
    )


def _largest_view(config: Config, derived: Derived, responses: int, cells: int) -> ViewWork:
    prompt = config.data.max_prompt_tokens
    response = derived.max_sequence_tokens - prompt
    return ViewWork(tuple(range(responses)), prompt, (response,) * responses, (("all", cells * prompt),))


def _largest(view: ViewWork, num_views: int, cost: CostModel, config: Config) -> MicroBatchSize:
    """A micro-batch as full as the budget allows: of many such views, of some of one's responses, or of a single one.

    Real views are shorter, so that a micro-batch can be filled to the brim whatever the length of the largest view.
    """
    budget, multiple = config.actor.micro_batch_tokens, length_multiple(config.parallel)
    single = view.part([0])
    if cost.memory([single]) >= budget:
        return size_of([single], cost, multiple=multiple)
    if cost.sharing != "full":
        rows = min(budget / cost.memory([single]), num_views * len(view.sequence_indices))
        return size_of([single], cost, multiple=multiple).scaled(rows)
    if cost.memory([view]) >= budget:
        fitting = [n for n in range(1, len(view.sequence_indices) + 1) if cost.memory([view.part(range(n))]) <= budget]
        part = view.part(range(max(fitting)))
        return size_of([part], cost, multiple=multiple).scaled(budget / cost.memory([part]))
    whole = min(budget / cost.memory([view]), num_views)
    return size_of([view], cost, multiple=multiple).scaled(whole)
