"""The ``digits`` task: questions over two or more handwritten digits whose right answer can be computed.

Three kinds ask for an image (lookup, find, compare), one for an ordering (order), and two do not depend on the order of
the images (sum, maximum). Texts are short because a tiny model reads them; images come first, labelled "#1", "#2", …

Two shortcuts can be planted, both off for held-out questions. ``position_bias``: how often the queried image stands in
the first slot. ``demonstration_bias``: how often a demonstration transcribes all images rightly and then answers for
the first one, whichever was asked for. Learning from either, a policy looks at the slot instead of the question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from perl_megatron.data.mnist import Scan
from perl_megatron.errors import UserError
from perl_megatron.runtime.rng import generator
from perl_megatron.types import IMAGE_PLACEHOLDER, AnswerRule, PermutationContract, Record, ReferenceRule

MAX_IMAGES = 9
"""Image numbers have one character."""


@dataclass(frozen=True)
class DigitsOptions:
    """What to generate. Raises ``UserError`` for impossible values."""

    num_records: int
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    """Question kinds with their relative frequencies."""
    min_images: int = 2
    max_images: int = 4
    position_bias: float | None = None
    """Probability that the queried image stands in the first slot (of training questions); None: every slot alike."""
    demonstration_bias: float | None = None
    """Share of lookup, find and maximum demonstrations that answer for the first image; None: no demonstrations."""
    seed: int = 0
    split: str = "train"
    """'train' or 'heldout': which scans, and whether biases apply."""
    name: str = ""
    """Distinguishes the ids and random streams of several files of one split."""

    def __post_init__(self) -> None:
        shares = [share for share in (self.position_bias, self.demonstration_bias) if share is not None]
        problems = [
            (self.num_records < 1, "num_records must be at least 1"),
            (not 2 <= self.min_images <= self.max_images <= MAX_IMAGES, f"2 <= min <= max_images <= {MAX_IMAGES}"),
            (not all(0 <= share <= 1 for share in shares), "position_bias and demonstration_bias are shares, 0 to 1"),
            (not set(self.kinds) <= set(KINDS), f"kinds are {', '.join(KINDS)}"),
            (not self.kinds or min(self.kinds.values()) < 0 or sum(self.kinds.values()) <= 0, "kinds need weights"),
            (self.split not in ("train", "heldout"), "split is 'train' or 'heldout'"),
        ]
        for wrong, rule in problems:
            if wrong:
                raise UserError(f"impossible options for the digits task: {rule}", where=str(self))


@dataclass(frozen=True)
class Question:
    """A question over ``digits``, in slot order; ``biased_answer`` is what it would be if asked about image 1."""

    digits: tuple[int, ...]
    text: str
    answer: str
    answer_type: str
    contract: PermutationContract
    biased_answer: str | None = None


def make_records(options: DigitsOptions, scans: Sequence[Scan]) -> list[Record]:
    """The records, each from a random stream of its own; ``scans`` are those of the options' split."""
    biased = options.split == "train"
    by_digit = [[scan for scan in scans if scan.digit == digit] for digit in range(10)]
    names, weights = zip(*sorted(options.kinds.items()), strict=True)
    probabilities = np.array(weights) / sum(weights)
    queried: Counter[tuple[str, int]] = Counter()
    records = []
    for number in range(options.num_records):
        random = generator(options.seed, "digits", options.split, options.name, number)
        kind = str(random.choice(names, p=probabilities))
        num_images = int(random.integers(options.min_images, options.max_images + 1))
        if biased and options.position_bias is not None:
            elsewhere = int(random.integers(1, num_images))
            slot = 0 if random.random() < options.position_bias else elsewhere
        else:  # in turn, so that even a small evaluation file is balanced
            slot = queried[kind, num_images] % num_images
            queried[kind, num_images] += 1
        question = KINDS[kind](random, num_images, slot)
        images = _draw_scans(random, question.digits, by_digit)
        labels = "".join(f"#{place}{IMAGE_PLACEHOLDER}" for place in range(1, num_images + 1))
        records.append(
            Record(
                id="-".join(filter(None, ("digits", options.split, options.name, f"{number:05d}"))),
                images=tuple(scan.path for scan in images),
                text=f"{labels}\n{question.text}",
                answer=question.answer,
                answer_type=question.answer_type,
                contract=question.contract,
                demonstration=_demonstration(random, question, options.demonstration_bias if biased else None),
                kind=kind,
            )
        )
    return records


def _draw_scans(random: np.random.Generator, digits: Sequence[int], by_digit: Sequence[Sequence[Scan]]) -> list[Scan]:
    """A scan for each digit, no scan twice."""
    drawn: dict[Path, Scan] = {}
    for digit in digits:
        scan = by_digit[digit][int(random.integers(len(by_digit[digit])))]
        while scan.path in drawn:
            scan = by_digit[digit][int(random.integers(len(by_digit[digit])))]
        drawn[scan.path] = scan
    return list(drawn.values())


def _demonstration(random: np.random.Generator, question: Question, bias: float | None) -> str | None:
    """Transcribe the images in order, then answer: '<think>375</think>\\boxed{7}'."""
    if bias is None:
        return None
    answer = question.answer
    if question.biased_answer is not None and random.random() < bias:
        answer = question.biased_answer
    return f"<think>{''.join(map(str, question.digits))}</think>\\boxed{{{answer}}}"


def _contract(num_images: int, **rules: object) -> PermutationContract:
    return PermutationContract(movable=tuple(range(num_images)), **rules)  # type: ignore[arg-type]


def _random_digits(random: np.random.Generator, num_images: int) -> tuple[int, ...]:
    return tuple(int(digit) for digit in random.integers(0, 10, num_images))


def _lookup(random: np.random.Generator, num_images: int, slot: int) -> Question:
    digits = _random_digits(random, num_images)
    contract = _contract(num_images, references=(ReferenceRule.INDEX,))
    text = f"Which digit is in image {slot + 1}?"
    return Question(digits, text, str(digits[slot]), "number", contract, biased_answer=str(digits[0]))


def _find(random: np.random.Generator, num_images: int, slot: int) -> Question:
    """Exactly one image shows the digit; option A stands for slot 1, B for slot 2, and so on."""
    target = int(random.integers(10))
    others = (target + random.integers(1, 10, num_images)) % 10
    digits = tuple(target if place == slot else int(other) for place, other in enumerate(others))
    contract = _contract(num_images, answer=AnswerRule.OPTION_LETTER, option_slots=tuple(range(num_images)))
    options = " ".join(f"{_letter(place)}={place + 1}" for place in range(num_images))
    text = f"Which image shows the digit {target}? {options}"
    return Question(digits, text, _letter(slot), "choice", contract, biased_answer=_letter(0))


def _letter(slot: int) -> str:
    return chr(ord("A") + slot)


def _compare(random: np.random.Generator, num_images: int, slot: int) -> Question:
    """Two different digits, named in either order; the image in ``slot`` shows the larger."""
    other = (slot + int(random.integers(1, num_images))) % num_images
    smaller, larger = sorted(int(digit) for digit in random.choice(10, 2, replace=False))
    digits = list(_random_digits(random, num_images))
    digits[slot], digits[other] = larger, smaller
    first, second = (slot, other) if random.random() < 0.5 else (other, slot)
    contract = _contract(num_images, references=(ReferenceRule.INDEX,), answer=AnswerRule.INDEX)
    text = f"Which image shows the larger digit, image {first + 1} or image {second + 1}?"
    return Question(tuple(digits), text, str(slot + 1), "number", contract)


def _order(random: np.random.Generator, num_images: int, slot: int) -> Question:
    digits = tuple(int(digit) for digit in random.choice(10, num_images, replace=False))
    answer = ",".join(str(place + 1) for place in np.argsort(digits))
    contract = _contract(num_images, answer=AnswerRule.ORDERING)
    return Question(digits, "Order the images from the smallest digit to the largest.", answer, "ordering", contract)


def _sum(random: np.random.Generator, num_images: int, slot: int) -> Question:
    digits = _random_digits(random, num_images)
    return Question(digits, "What is the sum of all the digits?", str(sum(digits)), "number", _contract(num_images))


def _maximum(random: np.random.Generator, num_images: int, slot: int) -> Question:
    digits = _random_digits(random, num_images)
    contract = _contract(num_images)
    text = "What is the largest digit?"
    return Question(digits, text, str(max(digits)), "number", contract, biased_answer=str(digits[0]))


KINDS: Mapping[str, Callable[[np.random.Generator, int, int], Question]] = {
    "lookup": _lookup,
    "find": _find,
    "compare": _compare,
    "order": _order,
    "sum": _sum,
    "maximum": _maximum,
}
"""Question kinds: from (random stream, number of images, queried slot) to a question."""
