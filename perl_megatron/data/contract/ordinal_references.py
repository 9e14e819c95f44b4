"""References by ordinal: "the second image", "the 2nd picture", "the first and the last image", "the first two images".

"The second largest image" and "the first in image 2" are none. An ordinal without its noun ("Is the first larger than
the second?", "the second one", "the image shown first"), one counted from the end ("the second to last image"), one
that chooses among some of the images ("the first blurry image", "the first of these images"), and one of several images
together ("the first pair of images") cannot follow and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from perl_megatron.data.contract.reference_phrases import (
    NEUTRAL,
    NOUN,
    NOUN_AT_WORD_START,
    NUMBERS,
    ORDINALS,
    Phrase,
    Reference,
    as_number,
    cannot_follow,
    holds_any,
    ordinal_reference,
    preceded_by,
)

_COUNTS = NUMBERS[1:10]
_STEMS: tuple[str, ...] = (*ORDINALS[:12], "teenth", "twentieth", "last", "final", "ultimate", "1st", "2nd", "3rd")
_STEMS += tuple(f"{digit}th" for digit in range(10))
ORDINAL_WORD = rf"(?:{'|'.join(sorted(ORDINALS, key=len, reverse=True))}|last|final|\d++(?:st|nd|rd|th))\b"
_FIRST_ORDINAL = (
    r"(?-i:[fstenlFSTENL\d])(?<![\w-].)(?:"
    + "|".join(f"(?<={word[0]}){word[1:]}" for word in sorted([*ORDINALS, "last", "final"], key=len, reverse=True))
    + r"|(?<=\d)\d*+(?:st|nd|rd|th))\b"
)
"""``ORDINAL_WORD`` at a word's start, after a set of first letters, which lets the search skip all other places."""
_LIST = re.compile(
    rf"{_FIRST_ORDINAL}(?:(?:\s*+,\s*+(?:(?:and|or)\s++)?|\s++(?:and|or|to|vs\.?|versus|than|&)\s++)"
    rf"(?:the\s++)?{ORDINAL_WORD})*+",
    re.IGNORECASE,
)
_NOUN_AFTER = re.compile(rf"\s++(?:(?P<count>{'|'.join(_COUNTS)}|\d++)\s++)?{NEUTRAL}{NOUN}s?\b", re.IGNORECASE)
_TOKEN = re.compile(rf"\b{ORDINAL_WORD}", re.IGNORECASE)
_AT = re.compile(r"\bat\s+$", re.IGNORECASE)
_THE = re.compile(r"\bthe\s+$", re.IGNORECASE)
_NO_NOUN = re.compile(
    r"\s*+(?:$|[?.!;:)]|['’]s\b)|\s++(?:than|and|or|is|was|has|does|but|with|shows?)\b|\s*+,|\s++ones?\b", re.IGNORECASE
)
_FROM_THE_END = re.compile(
    rf"\b(?:(?:{ORDINAL_WORD}|next)[\s-]++(?:to[\s-]++)?last\s++{NOUN}|penultimate\s++{NOUN}"
    rf"|last\s++but\s++\w++\s++{NOUN})",
    re.IGNORECASE,
)
_CHOOSING = re.compile(rf"\s++(?P<adjective>[\w-]++)\s++{NOUN}(?P<plural>s?)\b", re.IGNORECASE)
_NOT_CHOOSING = re.compile(
    r"\w+est|most|least|best|worst|in|of|on|at|to|by|for|from|with|and|or|than|is|are|was|the|this|that|these|those|an?"
    r"|each|every|per|which|whose|see|both",
    re.IGNORECASE,
)

_SHOWN = r"(?:given|provided|input|attached|uploaded|shown|displayed|presented|listed|seen|mentioned)"
_TOGETHER = r"(?:pair|set|group|couple|batch|series|sequence|collection|triple|triplet)s?"
_OF = rf"(?:of|among|amongst|{_TOGETHER}|{_SHOWN}|{'|'.join(_COUNTS)}|\d++)\b"
_OF_SOME = re.compile(
    rf"\s++(?:{_OF}(?:\s++(?:{_OF}|(?:the|these|those|this|my|our|your|all|both)\b))*+\s++{NOUN}s?\b"
    rf"|(?:of|among|amongst)\s++(?!all\b)(?:(?:them|these|those)\b|(?:the|these|those)\s++(?:\w++\s++){{0,3}}?{NOUN}s?\b"
    rf"|the\s++(?:{'|'.join(_COUNTS)}|\d++)\b)"
    rf"|(?:half|halves|rows?|columns?)\s++of\s++(?:the\s++|these\s++|those\s++)?(?:\w++\s++)?{NOUN}s\b)"
    rf"|-\w++\s++{NOUN}s?\b",
    re.IGNORECASE,
)
_TOGETHER_AFTER = re.compile(rf"(?:\s++|-){_TOGETHER}\b(?!\s++(?:in|on|at)\b)", re.IGNORECASE)
_NOUN_SHOWN = re.compile(
    rf"{NOUN_AT_WORD_START}s?\s++(?:(?:that|which)\s++)?(?:(?:is|are|was|were|has\s++been)\s++)?"
    rf"(?:(?:{_SHOWN}|comes?|came|coming|appears?|appeared|appearing)\s++|(?<=that\sis\s)|(?<=that\swas\s)|(?<=which\sis\s)"
    rf"|(?<=which\swas\s))(?:the\s++)?{ORDINAL_WORD}(?!\s++{NEUTRAL}{NOUN}s?\b)",
    re.IGNORECASE,
)


def find_ordinals(text: str, num_images: int) -> Iterator[Phrase]:
    """All phrases that name images by ordinal. Raises ``UserError`` for those that cannot follow."""
    if not holds_any(text, _STEMS):
        return
    if holds_any(text, ("last", "penultimate")) and (unsafe := _FROM_THE_END.search(text)):
        raise cannot_follow(unsafe[0])
    if shown := _NOUN_SHOWN.search(text):
        raise cannot_follow(shown[0])
    for match in _LIST.finditer(text):
        tokens = list(_TOKEN.finditer(text, *match.span()))
        if preceded_by(text, match.start(), _AT):  # "at first, the second image …"
            tokens = tokens[1:]
        if not tokens:
            continue
        if noun := _NOUN_AFTER.match(text, match.end()):
            if together := _TOGETHER_AFTER.match(text, noun.end()):
                raise cannot_follow(text[match.start() : together.end()])
            references = [ordinal_reference(token[0], token.start(), num_images) for token in tokens]
            if noun["count"]:
                phrase = text[tokens[0].start() : noun.end()]
                references = [_counted(phrase, tokens, noun["count"].lower(), noun.end(), num_images)]
            yield Phrase(tokens[0].start(), noun.end(), tuple(references))
        else:
            _refuse_unsafe(text, tokens)


def _counted(phrase: str, tokens: list[re.Match[str]], word: str, end: int, num_images: int) -> Reference:
    """The set named by 'first two images' or 'last three images'."""
    count = _COUNTS.index(word) + 2 if word in _COUNTS else as_number(word)
    slots = {"first": (0, count), "1st": (0, count), "last": (num_images - count, num_images)}
    slots["final"] = slots["last"]
    if len(tokens) > 1 or (ordinal := tokens[0][0].lower()) not in slots:
        raise cannot_follow(phrase)
    first, stop = slots[ordinal]
    ends = tuple(range(first, stop)) if count <= num_images else (first, stop - 1)
    return Reference(tokens[0].start(), end, ends, None)


def _refuse_unsafe(text: str, tokens: list[re.Match[str]]) -> None:
    """Refuse an ordinal that names an image without the noun, or among some of the images."""
    start, end = tokens[0].start(), tokens[-1].end()
    if (missing := _NO_NOUN.match(text, end)) and preceded_by(text, start, _THE):
        raise cannot_follow("the " + text[start : missing.end()])
    if some := _OF_SOME.match(text, end):
        raise cannot_follow(text[start : some.end()])
    if (choosing := _CHOOSING.match(text, end)) and not _NOT_CHOOSING.fullmatch(choosing["adjective"]):
        raise cannot_follow(text[start : choosing.end()])
