"""A small world to ask about: images that show numbers, questions in many wordings, and a reader of its own.

Each question has a ``solve`` that reads a text and its options afresh, with a table of phrases instead of the product's
grammars, and works out the answer from the numbers that the images show. A record keeps its meaning under permutation
if, for every order, ``solve`` of the view gives the view's answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule

INDEX, ORDINAL, POSITION, LETTER, OPTION_TEXT = ReferenceRule
KINDS = (INDEX, ORDINAL, POSITION, LETTER)
# fmt: off
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
            "twelfth"]
NUMERALS = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th", "10th", "11th", "12th"]
# fmt: on
SIDES = {
    2: (["left", "right"], ["on the left", "on the right"]),
    3: (["leftmost", "middle", "rightmost"], ["on the far left", "in the middle", "on the far right"]),
}


def phrases(slot: int, num_images: int) -> list[str]:
    """Names of the image in a slot."""
    names = [
        f"image {slot + 1}",
        f"Image {slot + 1}",
        f"Picture #{slot + 1}",
        f"fig. {slot + 1}",
        f"<image {slot + 1}>",
    ]
    names += [f"image {WORDS[slot]}", f"Image {chr(65 + slot)}", f"figure ({chr(97 + slot)})", f"image_{slot + 1}"]
    names += [f"the {ORDINALS[slot]} image", f"the {NUMERALS[slot]} photo", f"the {ORDINALS[slot]} given picture"]
    if slot == num_images - 1:
        names.append("the last image")
    if num_images in SIDES:
        adjectives, places = SIDES[num_images]
        names += [f"the {adjectives[slot]} image", f"the image {places[slot]}", f"the photo {places[slot]}"]
    return names


def slot_named(phrase: str, num_images: int) -> int:
    """The slot that a phrase names, by looking it up."""
    (slot,) = {
        slot
        for slot in range(num_images)
        if phrase.strip().rstrip(".").lower() in (name.lower() for name in phrases(slot, num_images))
    }
    return slot


@dataclass(frozen=True)
class Question:
    """A record about images that show ``numbers``, and how to answer a text of its form about other numbers."""

    record: Record
    solve: Callable[[str, Sequence[str], Sequence[int]], str]
    """From the text, the options' texts and the numbers in slot order to the answer."""


def shown(images: Sequence[Path]) -> list[int]:
    """The numbers that images show."""
    return [int(image.stem) for image in images]


def make(text: str, numbers: Sequence[int], solve, options: Sequence[str] = (), **contract) -> Question:
    contract = {"movable": tuple(range(len(numbers))), "references": KINDS} | contract
    if "<image>" not in text:
        text = "<image>" * len(numbers) + "\n" + text
    record = Record(
        id="world",
        images=tuple(Path(f"{number}.png") for number in numbers),
        text=text,
        answer=solve(text, options, numbers),
        contract=PermutationContract(**contract),
        grading=Grading(options=tuple(options)),
    )
    return Question(record, solve)


def listed(options: Sequence[str], random: Random) -> str:
    form, separator = random.choice([("({}) ", " "), ("({}) ", "\n"), ("{}. ", "\n"), ("{}) ", "\n"), ("{}: ", "\n")])
    return separator.join(form.format(chr(65 + index)) + option for index, option in enumerate(options))


def read(pattern: str, text: str, num_images: int) -> list[int]:
    """The slots that the groups of a pattern name in a text."""
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in {text!r}"
    return [slot_named(group, num_images) for group in match.groups()]


def two(random: Random, num_images: int) -> list[str]:
    """Names of two different images, of one style each."""
    return [random.choice(phrases(slot, num_images)) for slot in random.sample(range(num_images), 2)]


def lookup(random: Random, numbers: Sequence[int]) -> Question:
    name = random.choice(phrases(random.randrange(len(numbers)), len(numbers)))
    tail = random.choice(["", " Image sizes are 28x28; 2 dogs and 10 cats are left.", " Answer with (B) or 7."])
    return make(
        f"Which number is in {name}?{tail}",
        numbers,
        lambda text, _, seen: str(seen[read(r"is in (.+?)\?", text, len(seen))[0]]),
    )


def statement(random: Random, numbers: Sequence[int]) -> Question:
    """NLVR2: true or false of two images."""
    first, second = two(random, len(numbers))

    def solve(text, _, seen):
        one, other = read(r"Statement: (.+?) shows a larger number than (.+?)\. True", text, len(seen))
        return str(seen[one] > seen[other])

    return make(f"Statement: {first} shows a larger number than {second}. True or False?", numbers, solve)


def symmetric(random: Random, numbers: Sequence[int]) -> Question:
    text = "One image shows a number over 20, and none of the other images does. True or False?"
    return make(text, numbers, lambda _text, _, seen: str(sum(number > 20 for number in seen) == 1))


def total(random: Random, numbers: Sequence[int]) -> Question:
    slots = random.sample(range(len(numbers)), random.randint(2, len(numbers)))
    names = ", ".join(str(slot + 1) for slot in slots[:-1]) + f" and {slots[-1] + 1}"

    def solve(text, _, seen):
        listed_numbers = re.search(r"images ([\d, and]+)\?", text)[1]
        return str(sum(seen[int(number) - 1] for number in re.findall(r"\d+", listed_numbers)))

    return make(f"What is the sum of the numbers in images {names}?", numbers, solve)


def index_answer(random: Random, numbers: Sequence[int]) -> Question:
    target = random.choice(numbers)
    return make(
        f"Which image shows {target}? Answer with its number.",
        numbers,
        lambda _text, _, seen: str(seen.index(target) + 1),
        answer=AnswerRule.INDEX,
    )


def named_answer(random: Random, numbers: Sequence[int]) -> Question:
    first, second = two(random, len(numbers))

    def solve(text, _, seen):
        names = re.search(r"larger number, (.+?) or (.+?)\?", text).groups()
        return max(names, key=lambda name: seen[slot_named(name, len(seen))])

    text = f"Which shows the larger number, {first} or {second}?"
    return make(text, numbers, solve, answer=AnswerRule.REFERENCES)


def letter_answer(random: Random, numbers: Sequence[int]) -> Question:
    """Images that have letters of their own; the answer is the letter alone."""
    labels = "".join(f"Image {chr(65 + slot)}: <image>\n" for slot in range(len(numbers)))
    text = labels + "Which image shows the largest number? Answer with its letter."
    solve = lambda _text, _, seen: chr(65 + seen.index(max(seen)))  # noqa: E731
    return make(text, numbers, solve, references=(LETTER,), answer=AnswerRule.REFERENCES)


def ordering(random: Random, numbers: Sequence[int]) -> Question:
    separator = random.choice([", ", ",", " < ", "-"])
    solve = lambda _text, _, seen: separator.join(str(seen.index(number) + 1) for number in sorted(seen))  # noqa: E731
    return make("Order the images from the smallest number.", numbers, solve, answer=AnswerRule.ORDERING)


def chosen(options: Sequence[str], right: Callable[[str], bool], otherwise: str) -> str:
    """The letter of the option for which ``right`` holds, else that of ``otherwise``."""
    letters = [chr(65 + index) for index, option in enumerate(options) if option != otherwise and right(option)]
    return letters[0] if letters else chr(65 + list(options).index(otherwise))


def options_of(text: str, options: Sequence[str]) -> list[str]:
    """The options as the text shows them: they have to be those to be graded by."""
    found = re.findall(r"(?:\(?[A-M][).:]) (.+?)(?=\s+\(?[A-M][).:] |$)", text.split("OPTIONS\n")[1], re.DOTALL)
    assert found == list(options)
    return found


def options_that_follow(random: Random, numbers: Sequence[int]) -> Question:
    """Options name images; the letter stays and their texts follow."""
    target = random.choice([*numbers, 99])
    slots = random.sample(range(len(numbers)), min(len(numbers), 4))
    neither = random.choice(["neither", "none of these", "none of the above"])
    options = [random.choice(phrases(slot, len(numbers))) for slot in slots] + [neither]

    def solve(text, options, seen):
        return chosen(options_of(text, options), lambda o: seen[slot_named(o, len(seen))] == target, neither)

    return make(f"Which shows {target}?\nOPTIONS\n{listed(options, random)}", numbers, solve, options)


def options_that_stay(random: Random, numbers: Sequence[int]) -> Question:
    """The same options as slots; the texts stay and the letter follows."""
    target = random.choice([*numbers, 99])
    slots: list[int | None] = [*random.sample(range(len(numbers)), len(numbers))][:4]
    movable = tuple(slot for slot in slots if slot is not None)
    # Beside options that are images, "image A" is the image of option A.
    names = [
        [name for name in phrases(slot, len(numbers)) if not re.search(r" \(?[A-Za-z]\)?$", name)] for slot in movable
    ]
    options = [*map(random.choice, names), "neither"]
    text = f"Which shows {target}?\nOPTIONS\n{listed(options, random)}"

    def solve(text, options, seen):
        return chosen(options_of(text, options), lambda o: seen[slot_named(o, len(seen))] == target, "neither")

    contract = {"answer": AnswerRule.OPTION_LETTER, "option_slots": (*slots, None), "movable": movable}
    return make(text, numbers, solve, options, **contract)


def inline_options(random: Random, numbers: Sequence[int]) -> Question:
    """IconQA: the options are images, beside one that the question is about."""
    options = ["<image>"] * (len(numbers) - 1) + ["none of these"]
    text = f"<image>\nWhich shows one more than the first image?\nOPTIONS\n{listed(options, random)}"
    numbers = [numbers[0], *numbers[1:]]
    if random.random() < 0.7:
        numbers[random.randrange(1, len(numbers))] = numbers[0] + 1

    def solve(text, options, seen):
        options_of(text, options)
        right = [slot for slot in range(1, len(seen)) if seen[slot] == seen[0] + 1]
        return chr(65 + (right[0] - 1 if right else len(seen) - 1))

    slots = tuple(range(1, len(numbers)))
    contract = {"answer": AnswerRule.OPTION_LETTER, "option_slots": (*slots, None), "movable": slots}
    return make(text, numbers, solve, options, references=(ORDINAL,), **contract)


def ordering_options(random: Random, numbers: Sequence[int]) -> Question:
    """ShowHowTo: each option is an order of the images."""
    orders = [random.sample(range(1, len(numbers) + 1), len(numbers)) for _ in range(2)]
    orders.append([sorted(numbers).index(number) + 1 for number in numbers])
    orders[-1] = [numbers.index(number) + 1 for number in sorted(numbers)]
    separator = random.choice([", ", " - ", " → ", " < "])
    texts = list(dict.fromkeys(separator.join(map(str, order)) for order in orders))
    random.shuffle(texts)
    options = [*texts, "none of these"]

    def solve(text, options, seen):
        def ascends(option: str) -> bool:
            named = [seen[int(number) - 1] for number in re.findall(r"\d+", option)]
            return named == sorted(seen)

        return chosen(options_of(text, options), ascends, "none of these")

    text = f"Which order is right?\nOPTIONS\n{listed(options, random)}"
    return make(text, numbers, solve, options, references=(OPTION_TEXT,))


def bare_options(random: Random, numbers: Sequence[int]) -> Question:
    """Options that are a side, an ordinal, a number or a letter, and nothing else."""
    count = len(numbers)
    styles = [ORDINALS[:count], [f"the {ordinal}" for ordinal in ORDINALS[:count]], [str(n + 1) for n in range(count)]]
    styles += [["left", "right"]] if count == 2 else []
    names = random.choice(styles)
    options = [*random.sample(names, min(count, 4)), "both"]
    target = random.choice(numbers)

    def solve(text, options, seen):
        return chosen(options_of(text, options), lambda o: seen[names.index(o)] == target, "both")

    text = f"Which image shows {target}?\nOPTIONS\n{listed(options, random)}"
    return make(text, numbers, solve, options, references=(ORDINAL, POSITION, OPTION_TEXT))


QUESTIONS = (lookup, statement, symmetric, total, index_answer, named_answer, letter_answer, ordering,
             options_that_follow, options_that_stay, inline_options, ordering_options, bare_options)  # fmt: skip
