"""The first stage: which rows of the source are multi-image questions with an answer that can be checked.

Rules look at the text first, so that images are read only for questions that pass. Kept images go into an image store
and are decoded once, so that nothing is found broken later.
"""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from perl_megatron.data.image_store import MAX_IMAGE_BYTES, ImageStore, image_suffix
from perl_megatron.data.images import FORMATS, MAX_SOURCE_PIXELS, MERGED_PATCH, smart_resize
from perl_megatron.errors import UserError
from perl_megatron.preparation.choices import Choice, split_choice
from perl_megatron.preparation.mantis import BrokenRow, Candidate, read_candidates
from perl_megatron.preparation.question import Dropped, Kept, Question
from perl_megatron.preparation.settings import RuleSettings, SourceSettings
from perl_megatron.preparation.table_images import TableImages
from perl_megatron.runtime.image_errors import image_fault
from perl_megatron.types import IMAGE_PLACEHOLDER

IMAGE_FOLDER = "images"
_ORIENTATION = 0x0112
_ROTATED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


@dataclass(frozen=True)
class AlreadyDone:
    """A row that an earlier run has decided."""

    id: str


def apply_rules(
    source: SourceSettings, rules: RuleSettings, folder: Path | None, done: Collection[str]
) -> Iterator[Kept | Dropped | AlreadyDone]:
    """What becomes of each row, in the source's order.

    Args:
        folder: the pipeline's folder, whose `images/` gets the kept images. None: nothing is written, and kept
            questions name no files (a dry run).
        done: ids that are decided already; their images are not decoded again.
    """
    images = TableImages(source.images, follow_links=source.follow_links)
    store = None if folder is None else ImageStore(folder / IMAGE_FOLDER)
    seen: set[bytes] = set()
    ids: Counter[str] = Counter()
    try:
        for candidate in read_candidates(source):
            ids[candidate.id] += 1
            count = ids[candidate.id]
            # Two tables may count alike.
            unique = candidate if count == 1 else replace(candidate, id=f"{candidate.id}#{count}")
            yield _judge(unique, rules, images, store, seen, is_done=unique.id in done)
    finally:
        images.close()


def _judge(
    candidate: Candidate | BrokenRow,
    rules: RuleSettings,
    images: TableImages,
    store: ImageStore | None,
    seen: set[bytes],
    *,
    is_done: bool,
) -> Kept | Dropped | AlreadyDone:
    if isinstance(candidate, BrokenRow):
        return AlreadyDone(candidate.id) if is_done else Dropped(candidate.id, candidate.source, candidate.reason)
    choice = split_choice(candidate.text, candidate.answer)
    reason, detail = broken_rule(candidate, choice, rules), ""
    contents: list[bytes] = []
    if reason is None:
        try:
            contents = [images.read(image, candidate.table) for image in candidate.images]
        except UserError as error:
            reason, detail = "an image cannot be read", error.what
    if reason is None and rules.drop_duplicates:
        key = _key(candidate, contents)
        reason = "it is a duplicate" if key in seen else None
        seen.add(key)  # also of what is done: a later copy is a duplicate of it
    if is_done:
        return AlreadyDone(candidate.id)
    if reason is None:
        try:
            sizes = tuple(_checked_size(content, decode=store is not None) for content in contents)
        except UserError as error:
            reason, detail = "an image cannot be read", error.what
        else:
            return Kept(_question(candidate, choice, sizes, _stored(contents, store)))
    return Dropped(candidate.id, candidate.source, reason, detail)


def broken_rule(candidate: Candidate, choice: Choice | None, rules: RuleSettings) -> str | None:
    """The first rule on text and counts that a candidate breaks; None if it breaks none."""
    kind = "open" if choice is None else "choice"
    if kind not in rules.kinds:
        return f"the question type is '{kind}'"
    if len(candidate.images) < rules.min_images:
        return f"fewer than {rules.min_images} images"
    if len(candidate.images) > rules.max_images:
        return f"more than {rules.max_images} images"
    stem = candidate.text if choice is None else choice.stem
    words = stem.replace(IMAGE_PLACEHOLDER, "").strip()
    if len(words) < rules.min_question_characters:
        return "the question is too short"
    if len(words) > rules.max_question_characters:
        return "the question is too long"
    if not candidate.answer:
        return "the answer is empty"
    if choice is not None and choice.letter is None:
        return "the answer is none of the options"
    if choice is None and len(candidate.answer) > rules.max_answer_characters:
        return "the answer is too long"
    if latin_share(words + candidate.answer) < rules.min_latin_share:
        return "too few Latin letters"
    return None


def latin_share(text: str) -> float:
    """The share of Latin letters among all letters; 1 for a text without any."""
    letters = [character for character in text if character.isalpha()]
    latin = sum(character.isascii() or unicodedata.name(character, "").startswith("LATIN") for character in letters)
    return latin / len(letters) if letters else 1.0


def _key(candidate: Candidate, contents: list[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (candidate.text, candidate.answer):
        digest.update(" ".join(part.split()).casefold().encode("utf-8", "surrogatepass") + b"\0")
    for content in contents:
        digest.update(hashlib.blake2b(content, digest_size=16).digest())
    return digest.digest()


def _stored(contents: list[bytes], store: ImageStore | None) -> tuple[str, ...]:
    """Paths relative to the pipeline's folder. UserError where they cannot be written, which ends the run."""
    if store is None:
        return ()
    return tuple(os.path.relpath(store.add(content), store.folder.parent) for content in contents)


def _question(
    candidate: Candidate, choice: Choice | None, sizes: tuple[tuple[int, int], ...], paths: tuple[str, ...]
) -> Question:
    return Question(
        id=candidate.id,
        source=candidate.source,
        images=paths,
        image_sizes=sizes,
        text=candidate.text if choice is None else choice.stem,
        options=() if choice is None else choice.options,
        answer=candidate.answer if choice is None else str(choice.letter),
    )


def _checked_size(content: bytes, *, decode: bool) -> tuple[int, int]:
    """(width, height) of an image as it is shown. UserError for one that training would refuse; without ``decode``,
    only as far as its header tells."""
    if image_suffix(content) is None or len(content) > MAX_IMAGE_BYTES:
        raise UserError("it is no image of a known format, or too large")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_SOURCE_PIXELS:
                raise UserError(f"the image has more than {MAX_SOURCE_PIXELS} pixels")
            if decode:
                image.load()
            is_rotated = image.getexif().get(_ORIENTATION) in _ROTATED
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on corrupt bytes
        raise UserError(f"cannot read the image: {image_fault(error)}") from error
    smart_resize(height, width, min_pixels=MERGED_PATCH**2, max_pixels=MAX_SOURCE_PIXELS)  # refuses extreme shapes
    return (height, width) if is_rotated else (width, height)
