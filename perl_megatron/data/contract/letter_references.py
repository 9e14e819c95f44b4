"""References by letter: "image B", "Figure (c)", "images A, B and D", "image_a".

The B-th image; where the contract's options are images, the image of option B. Small letters are read where they are
no word: "image b", "image a?", but "picture a scene" is refused as ambiguous. A capital I is read only where the record
has that many images, and Roman numerals ("Figure II") are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from perl_megatron.data.contract.reference_phrases import (
    CONJUNCTION,
    NOUN_AT_WORD_START,
    SPACE,
    Phrase,
    Reference,
    cannot_follow,
)
from perl_megatron.errors import UserError

_ITEM = r"(?:\([A-Za-z]\)|\[[A-Za-z]\]|[A-Za-z](?![\w'’+#]|-\w))"
_LETTER = re.compile(
    rf"(?i:{NOUN_AT_WORD_START})(?P<plural>s?)\.?(?:[^\S\n]++|[-_])(?P<list>{_ITEM}"
    rf"(?P<rest>(?:{SPACE},{SPACE}{_ITEM})*+(?:{SPACE},?{SPACE}{CONJUNCTION}{SPACE}{_ITEM})*+))"
)
_TOKEN = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_ROMAN = re.compile(rf"(?i:{NOUN_AT_WORD_START})s?\.?[^\S\n]++(?=[IVX]{{2,4}}\b)[IVX]++\b")
_NO_ARTICLE = re.compile(
    r"\s*+(?:$|[?.!,;:)\]}>*/&]|<image>|(?:and|or|to|than|vs|versus|is|has|shows?|contains?|depicts?|with|but|from|in)\b)"
)


def find_letters(text: str, letters: Sequence[int | None]) -> Iterator[Phrase]:
    """All phrases that name images by letter; ``letters[i]`` is the slot of the i-th letter, None for no image.

    Raises ``UserError`` for a letter that names no image, and for what may be an article.
    """
    if roman := _ROMAN.search(text):
        raise cannot_follow(roman[0])
    for match in _LETTER.finditer(text):
        end = match.end() if match["plural"] else match.start("rest")
        tokens = list(_TOKEN.finditer(text, match.start("list"), end))
        if tokens[0][0] == "I" and len(letters) < 9:
            continue
        if tokens[0][0] in "aI" and not _NO_ARTICLE.match(text, end):
            raise UserError(
                f"'{text[match.start() : end + 12].strip()}' is ambiguous: is '{tokens[0][0]}' an image's letter?",
                fix="write letters of images as 'image A', or leave 'letter' out of the contract's references",
            )
        yield Phrase(match.start(), end, tuple(letter_reference(token[0], token.start(), letters) for token in tokens))


def letter_reference(token: str, start: int, letters: Sequence[int | None]) -> Reference:
    """The reference for a letter alone. Raises ``UserError`` if it names no image."""
    index = ord(token.upper()) - ord("A")
    slot = letters[index] if index < len(letters) else None
    if slot is None:
        raise UserError(
            f"the letter '{token}' refers to an image that does not exist",
            fix="correct the letter, or leave 'letter' out of the contract's references",
        )

    def render(new_slot: int) -> str:
        letter = chr(ord("A") + letters.index(new_slot))
        return letter if token.isupper() else letter.lower()

    # Beyond 26 images some have no letter that the reference could follow to.
    return Reference(start, start + 1, (slot,), render if len(letters) <= 26 else None)
