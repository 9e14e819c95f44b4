"""The auxiliary task "recover the order": which of the shuffled images is the same as each of the others?

Made from the images of any question, with an answer that is known without labels, so it asks for nothing but attention
to the order of the images (after Visual Jigsaw: Wu et al. 2025, arXiv 2509.25190, whose model puts shuffled parts of an
image, or clips of a video, back into order; here whole images are matched with a copy of themselves, because a set of
images has no order of its own to recover). The question has a contract, so it has permuted views as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from perl_megatron.config.schema import PermutationConfig
from perl_megatron.runtime.rng import generator
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, PermutationContract, Record

MAX_IMAGES = 9
"""A record with more images is left alone: the question shows each of them twice."""
KIND = "recover_order"
"""The question kind, for reports."""


def maybe_recover_order(
    record: Record, image_keys_of: Callable[[Record], Sequence[str]], *, probability: float, seed: int, step: int
) -> Record:
    """The record, or with ``probability`` the auxiliary question made from its images.

    The draw depends on (seed, step, record) alone. Records with fewer than 2 images, more than ``MAX_IMAGES``, or two
    images that look the same stay as they are: there would be nothing to recover, too much to show, or no single
    answer.

    Args:
        image_keys_of: a name for what the model sees of each image of a record (its pixels after the resize, whatever
            the file), equal for equal ones; asked only where the draw says so. What it raises is raised.
    """
    count = len(record.images)
    if probability == 0 or not 2 <= count <= MAX_IMAGES:
        return record
    stream = generator(seed, "recover order", step, record.id)
    if stream.random() >= probability or len(set(image_keys_of(record))) < count:
        return record
    return recover_order_question(record, [int(slot) for slot in stream.permutation(count)])


def recover_order_question(record: Record, order: Sequence[int]) -> Record:
    """The record's k images in their own order, then as images k + 1 … 2k in ``order`` (image k + 1 + j is order[j]).

    The answer is the list of the second block's numbers of images 1 … k. Only the second block moves between views: its
    order may be the first block's, so that the answer is not known to be another.
    """
    count = len(record.images)
    assert sorted(order) == list(range(count)), f"{order} is not an order of {count} images"
    block, second = IMAGE_PLACEHOLDER * count, f"images {count + 1} to {2 * count}"
    text = (
        f"These are images 1 to {count}:\n{block}\n"
        f"These are {second}, the same ones in an order that may be another:\n{block}\n"
        f"For each of images 1 to {count}, in this order, give the number of the same image among {second}, "
        "separated by commas."
    )
    return Record(
        id=f"{record.id}#{KIND}",
        images=(*record.images, *(record.images[slot] for slot in order)),
        text=text,
        answer=", ".join(str(count + 1 + list(order).index(slot)) for slot in range(count)),
        answer_type="ordering",
        contract=PermutationContract(movable=tuple(range(count, 2 * count)), answer=AnswerRule.ORDERING),
        kind=KIND,
        source=record.source,
    )


def most_images_asked(count: int, permutation: PermutationConfig) -> int:
    """The most images that a question made from a record of at most ``count`` images may show."""
    if permutation.recover_order == 0 or count < 2:
        return count
    return max(count, 2 * min(count, MAX_IMAGES))
