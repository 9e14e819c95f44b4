"""References by position: images side by side, the first on the left.

"The left image", "the picture on the right", "the leftmost photo", "the left and the right image", and after such a
phrase "the right one", "than the one on the right" and "… in the right." With two images, left and right; with
three, left, middle and right, where left and right are "leftmost" or "far left", or the middle image is named too. With
more, "leftmost" and "rightmost", which cannot be rewritten and so need fixed slots. A single image has no side.

Left and right are also words about what an image shows. Those that surely are ("left hand", "turns right", "how many
are left?") stay; any other left or right that is no reference ("the dog on the left") is refused, since it could be
either. Top and bottom are not read: the order of the images does not say how they are stacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from perl_megatron.data.contract.reference_phrases import (
    NEUTRAL,
    NOUN,
    NOUN_AT_WORD_START,
    Phrase,
    Reference,
    cannot_follow,
    holds_any,
    in_case_of,
    preceded_by,
)
from perl_megatron.errors import UserError

_SIDES = ("left", "right", "middle", "cent", "top", "bottom", "upper", "lower")
_SIDE = r"(?:(?:left|right)(?:[- ]?most)?|middle|cent(?:er|re|ral))"
_HAND = r"(?:[- ]hand)?+(?:[- ]side)?+"
_AND = r"(?:\s*+,\s*+(?:(?:and|or)\s++)?|\s++(?:and|or|vs\.?|versus|than|&)\s++|\s*+/\s*+)(?:the\s++)?"
_BEFORE = re.compile(
    rf"\b(?P<side>{_SIDE})(?P<hand>{_HAND})"
    rf"(?:{_AND}(?P<second>{_SIDE})(?P<hand2>{_HAND}))?(?:{_AND}(?P<third>{_SIDE})(?P<hand3>{_HAND}))?"
    rf"\s++{NEUTRAL}{NOUN}(?P<plural>s?)\b",
    re.IGNORECASE,
)
_AFTER = re.compile(
    rf"{NOUN_AT_WORD_START}(?P<plural>s?)\s++(?:(?:that\s++is\s++|which\s++is\s++)?(?:shown|located|placed|positioned|displayed)?\s*+)"
    rf"(?P<where>(?P<preposition>on|to|at|in)\s++(?:the\s++)?(?P<far>far\s++|very\s++)?(?P<side>left|right|middle|center"
    rf"|centre)(?P<hand>{_HAND}))\b(?!\s++of\b)(?!\s++{NOUN})",
    re.IGNORECASE,
)
_AGAIN = re.compile(
    r"\bthe\s++(?P<one>left|right)\s++one\b|\b(?:than|as|unlike)\s++the\s++one\s++on\s++the\s++(?P<behind>left|right)\b"
    r"|\b(?:than|in)\s++the\s++(?P<alone>left|right)\b(?=\s*+(?:$|[.?!,;]))",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\b(?P<side>left|right)\s*+[:=]\s*+(?=<image>)", re.IGNORECASE)
_SIDE_WORD = re.compile(r"\b(?:left|right)(?:[- ]?most)?\b", re.IGNORECASE)
_UNFOLLOWED = re.compile(
    rf"\b(?:top|bottom|upper|lower)(?:[- ]?most)?\s++(?:left\s++|right\s++)?{NOUN}s?\b"
    rf"|\b{NOUN}s?\s++(?:at|on|in)\s++the\s++(?:top|bottom)\b(?!\s++of\b)",
    re.IGNORECASE,
)
_OF_A_THING = re.compile(
    r"(?:left|right)(?:[- ]hand(?:s|ed)?\b(?![- ]+side)|[- ](?:arm|leg|foot|feet|eye|ear|shoulder|knee|wing|paw|wrist"
    r"|ankle|cheek|glove|shoe|facing|angles?|angled|triangles?|answers?|options?|choices?|now|away|click)\b|'s\b)",
    re.IGNORECASE,
)
_DIRECTION = re.compile(
    r"\b(?:turn|fac|look|point|head|mov|walk|run|driv|lean|tilt|angl|swim|fly|rid|go)\w{0,5}\s+"
    r"(?:(?:to|toward|towards)\s+the\s+)?$",
    re.IGNORECASE,
)
_NO_DIRECTION = re.compile(r"\s++(?:of|side|hand|image|picture|photo|figure|one)", re.IGNORECASE)
_REMAINING = re.compile(r"\b(?:is|are|was|were|has|have|had)\s+$", re.IGNORECASE)
_IS_IT = re.compile(r"\b(?:statement|claim|caption|description|that|this|it)\s+(?:is\s+)?$", re.IGNORECASE)
_NO_MORE = re.compile(r"\s*+(?:$|[?.!,;])|\s++(?:over|behind|open|alone|after)\b", re.IGNORECASE)


def find_positions(text: str, num_images: int) -> Iterator[Phrase]:
    """All phrases that name images by their side. Raises ``UserError`` for other sides, unless they are harmless."""
    if not holds_any(text, _SIDES):
        return
    if stacked := _UNFOLLOWED.search(text):
        raise cannot_follow(stacked[0])
    before, after = list(_BEFORE.finditer(text)), list(_AFTER.finditer(text))
    sides = [match[group] for match in before for group in ("side", "second", "third") if match[group]]
    sides += [match["side"] for match in after]
    has_middle = any(_slot(side, 3) == 1 for side in sides)
    understood = {match.start("side") for match in after}
    for match in before:
        found = [(match[side], match.start(side), match[hand]) for side, hand in _GROUPS if match[side]]
        found = [item for item in found if item[1] not in understood]  # "the image on the left or the right image"
        if not found:
            continue
        understood.update(start for _, start, _ in found)
        references = [_adjective(*item, num_images, has_middle) for item in found]
        if match["plural"] and len(found) == 1:
            raise cannot_follow(match[0])
        yield Phrase(found[0][1], match.end(), tuple(references))
    for match in after:
        if match["plural"]:
            raise cannot_follow(match[0])
        yield Phrase(match.start(), match.end(), (_prepositional(match, num_images, has_middle),))
    understood.update(match.start("side") for match in _LABEL.finditer(text))
    first_phrase = min((match.start() for match in (*before, *after)), default=len(text))
    for match in _AGAIN.finditer(text):
        start = match.start(str(match.lastgroup))
        if num_images == 2 and match.start() > first_phrase and start not in understood:
            understood.add(start)
            yield Phrase(match.start(), match.end(), (_swapped(match[str(match.lastgroup)], start),))
    _refuse_others(text, understood)


_GROUPS = (("side", "hand"), ("second", "hand2"), ("third", "hand3"))


def position_reference(token: str, start: int, num_images: int) -> Reference:
    """The reference for a side that stands alone, in an answer or an option: 'left', 'rightmost', 'Middle'."""
    return _adjective(token, start, "", num_images, has_middle=True)


def _slot(side: str, num_images: int) -> int:
    side = side.lower()
    if side.startswith("left"):
        return 0
    return num_images - 1 if side.startswith("right") else num_images // 2


def _adjective(token: str, start: int, hand: str, num_images: int, has_middle: bool) -> Reference:
    """The reference for 'left', 'leftmost', 'left-hand' or 'middle' before a noun."""
    _check_side(token, num_images, has_middle)
    slot, end = _slot(token, num_images), start + len(token)
    if num_images == 2:
        return _swapped(token, start)
    words = ("leftmost", "middle", "rightmost")
    if num_images > 3 or hand:
        return Reference(start, end, (slot,), None)
    return Reference(start, end, (slot,), lambda new_slot: in_case_of(token, words[new_slot]))


def _swapped(token: str, start: int) -> Reference:
    """One of two images: 'left' and 'right' trade places, whatever stands around them."""
    slot, ending = _slot(token, 2), re.sub(r"^(?:left|right)", "", token, flags=re.IGNORECASE)

    def render(new_slot: int) -> str:
        return in_case_of(token, ("left", "right")[new_slot]) + ending

    return Reference(start, start + len(token), (slot,), render)


def _prepositional(match: re.Match[str], num_images: int, has_middle: bool) -> Reference:
    """The reference for 'on the left', 'in the middle' or 'on the far right' behind a noun."""
    side = match["side"]
    _check_side(side + ("most" if match["far"] else ""), num_images, has_middle)
    slot = _slot(side, num_images)
    if num_images == 2:
        return _swapped(side, match.start("side"))
    start, end = match.span("where")
    words = ("on the far left", "in the middle", "on the far right")
    if num_images > 3 or match["hand"]:
        return Reference(start, end, (slot,), None)
    return Reference(start, end, (slot,), lambda new_slot: in_case_of(match["where"], words[new_slot]))


def _check_side(side: str, num_images: int, has_middle: bool) -> None:
    """Refuse a side that does not single out one of the images."""
    side = side.lower()
    outermost, middle = side.endswith("most"), not side.startswith(("left", "right"))
    clear = num_images == 2 if not (outermost or middle) else (num_images >= 2 if outermost else num_images % 2 == 1)
    if not (clear or (num_images == 3 and has_middle)) or num_images < 2:
        raise UserError(
            f"'{side}' does not name one of {num_images} images placed side by side",
            fix="name the image by its number, or leave 'position' out of the contract's references",
        )


def _refuse_others(text: str, understood: set[int]) -> None:
    """Refuse any left or right that may be an image's or something's within an image."""
    for word in _SIDE_WORD.finditer(text):
        if word.start() not in understood and not _is_within_an_image(text, word):
            around = text[max(0, word.start() - 20) : word.end() + 20]
            raise UserError(
                f"'{word[0]}' in '…{' '.join(around.split())}…' is ambiguous: is it an image's side, or something's "
                "within an image?",
                fix="name images as 'the left image', or leave 'position' out of the contract's references",
            )


def _is_within_an_image(text: str, word: re.Match[str]) -> bool:
    """Whether a left or right is surely no image's: "left hand", "turns right", "are any left?", "is it right?"."""
    if _OF_A_THING.match(text, word.start()):
        return True
    if preceded_by(text, word.start(), _DIRECTION, window=40):
        return _NO_DIRECTION.match(text, word.end()) is None
    if not _NO_MORE.match(text, word.end()):
        return False
    return bool(preceded_by(text, word.start(), _REMAINING) or preceded_by(text, word.start(), _IS_IT))
