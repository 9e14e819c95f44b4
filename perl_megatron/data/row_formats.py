"""The rows of other projects' datasets as questions: one function for each format.

A row that cannot be read as its format says raises ``UserError``; its caller drops and names it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perl_megatron.data.answer_guess import with_options
from perl_megatron.errors import UserError
from perl_megatron.types import IMAGE_PLACEHOLDER

RECORDS = "records"
"""The format of our own files of records."""
RECORD_COLUMNS = {"id", "images", "text", "answer"}
USERS, ASSISTANTS = ("user", "human"), ("assistant", "gpt")
MAX_TEXT = 100_000
"""Characters of a question or an answer; longer ones are no questions."""


@dataclass(frozen=True)
class Draft:
    """A question as a row gives it. I images."""

    id: str | None
    """None where the row has none."""
    images: tuple[bytes | str, ...]
    """For each image the bytes of its file, or the path to it."""
    text: str
    """With I placeholders."""
    answer: str
    source: str = ""
    """The dataset that the question came from, where the row says it: it decides about the permutation contract."""
    kind: str = ""


def read_mantis(values: Mapping[str, Any]) -> list[Draft]:
    """Mantis-Instruct: ``id``, ``images`` and ``conversation`` (or ``conversations``) of user and assistant.

    Each pair of turns is a question, the second one with the id's suffix '#2' and so on. It sees the images up to its
    own turn; those of earlier turns come first, and so do images without a placeholder in any turn. What was said
    before it is left out.
    """
    images, record_id = _images(values), _id(values)
    given = (values.get("conversation"), values.get("conversations"))  # a table of both kinds of rows has both
    pairs = _turns(next((turns for turns in given if turns is not None), None))
    if not pairs:
        raise UserError("the conversation has no answer of an assistant")
    num_unplaced = len(images) - sum(question.count(IMAGE_PLACEHOLDER) for question, _ in pairs)
    if num_unplaced < 0:
        raise UserError(f"the conversation has more {IMAGE_PLACEHOLDER} placeholders than images")
    drafts = []
    num_before = num_unplaced
    for number, (question, answer) in enumerate(pairs, start=1):
        num_seen = num_before + question.count(IMAGE_PLACEHOLDER)
        suffix = "" if number == 1 else f"#{number}"
        drafts.append(
            Draft(
                None if record_id is None else record_id + suffix,
                images[:num_seen],
                _placed(question, num_seen),
                answer,
                _optional_text(values, "source", "data_source"),
                _optional_text(values, "question_type", "category"),
            )
        )
        num_before = num_seen
    return drafts


def read_mmk12(values: Mapping[str, Any]) -> list[Draft]:
    """MMK12 and K12: ``id``, ``question``, ``answer``, ``subject``, ``image``."""
    images = _images(values)
    text = _placed(_text(values, "question"), len(images))
    answer, kind = _text(values, "answer"), _optional_text(values, "subject")
    return [Draft(_id(values), images, text, answer, _optional_text(values, "source", "data_source"), kind)]


def read_verl(values: Mapping[str, Any]) -> list[Draft]:
    """Rows of veRL: ``data_source``, ``prompt`` (a chat), ``images``, ``reward_model.ground_truth``, ``extra_info``.

    Of the chat the user's messages are the question; its system message is replaced by `data.system_prompt`.
    """
    images = _images(values)
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        question = prompt
    else:
        messages = [_message(message) for message in _list(prompt, "prompt")]
        question = "\n".join(content for role, content in messages if role in USERS)
    reward, extra = values.get("reward_model"), values.get("extra_info")
    if not isinstance(reward, Mapping):
        raise UserError("reward_model is no object with a ground_truth")
    source = _optional_text(values, "data_source")
    extra = extra if isinstance(extra, Mapping) else {}
    record_id = _id(values)
    if record_id is None and isinstance(extra.get("index"), int | str):
        parts = (source.rpartition("/")[2], _optional_text(extra, "split"), str(extra["index"]))
        record_id = "-".join(part for part in parts if part)
    answer = _text(reward, "ground_truth")
    return [Draft(record_id, images, _placed(question, len(images)), answer, source, _optional_text(values, "ability"))]


def read_easyr1(values: Mapping[str, Any]) -> list[Draft]:
    """Rows of EasyR1: ``problem`` with placeholders, ``images``, ``answer``."""
    images = _images(values)
    text = _placed(_text(values, "problem"), len(images))
    source, kind = _optional_text(values, "source", "data_source"), _optional_text(values, "problem_type", "category")
    return [Draft(_id(values), images, text, _text(values, "answer"), source, kind)]


def read_plain(values: Mapping[str, Any]) -> list[Draft]:
    """Plain rows, under the names that are usual: question, answer, images, and perhaps id, options and source."""
    images = _images(values)
    question = _text(values, "question", "problem", "text", "query", "prompt")
    options = values.get("options", values.get("choices"))
    if options is not None:
        question = with_options(question, [_plain_text(option, "options") for option in _list(options, "options")])
    answer = _text(values, "answer", "ground_truth", "solution", "label")
    source = _optional_text(values, "source", "data_source", "dataset")
    kind = _optional_text(values, "kind", "category", "subject", "task", "question_type")
    return [Draft(_id(values), images, _placed(question, len(images)), answer, source, kind)]


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Draft]]] = {
    "mantis": read_mantis,
    "mmk12": read_mmk12,
    "verl": read_verl,
    "easyr1": read_easyr1,
    "jsonl": read_plain,
}


def detect_format(columns: Sequence[str], where: str) -> str:
    """The format that rows with these columns have. Raises UserError where none fits, or more than one could."""
    names = set(columns)
    if names >= RECORD_COLUMNS and names & {"contract", "answer_type"}:
        return RECORDS
    if "images" in names and names & {"conversation", "conversations"}:
        return "mantis"
    if {"prompt", "reward_model"} <= names:
        return "verl"
    if {"problem", "answer", "images"} <= names:
        return "easyr1"
    if {"question", "answer", "subject", "image"} <= names:
        return "mmk12"
    if names & {"question", "query"} and names & {"answer", "ground_truth"} and not names & {"problem", "prompt"}:
        return "jsonl"
    what = f"the columns {sorted(names)[:12]} belong to no known format, or to more than one"
    raise UserError(what, where=where, fix=f"name the format: --format {', '.join([*FORMATS, RECORDS])}")


def _placed(text: str, num_images: int) -> str:
    """The text with a placeholder for each image: the missing ones go first."""
    missing = num_images - text.count(IMAGE_PLACEHOLDER)
    if missing < 0:
        raise UserError(f"the text has {num_images - missing} {IMAGE_PLACEHOLDER} placeholders for {num_images} images")
    return IMAGE_PLACEHOLDER * missing + "\n" + text if missing else text


def _turns(conversation: object) -> list[tuple[str, str]]:
    """(question, answer) of each pair; what an assistant says first, or after an answer, is joined to nothing."""
    pairs: list[tuple[str, str]] = []
    asked: list[str] = []
    for message in _list(conversation, "conversation"):
        role, content = _message(message)
        if role in USERS:
            asked.append(content)
        elif role in ASSISTANTS and asked:
            if IMAGE_PLACEHOLDER in content:
                raise UserError(f"an answer holds {IMAGE_PLACEHOLDER}")
            pairs.append((_bounded("\n".join(asked)), _bounded(content)))
            asked = []
    return pairs


def _message(message: object) -> tuple[str, str]:
    """(role, content); a content in parts is joined, an image's part becomes a placeholder."""
    if not isinstance(message, Mapping):
        raise UserError("a message of the chat is no object with role and content")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        content = "".join(
            IMAGE_PLACEHOLDER if part.get("type") in ("image", "image_url") else str(part.get("text") or "")
            for part in parts
        )
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError("a message of the chat has no role or no text")
    return role, content


def _images(values: Mapping[str, Any]) -> tuple[bytes | str, ...]:
    given = values.get("images")
    if given is None:
        given = values.get("image")
    if given is None:
        return ()
    return tuple(_image(image) for image in (given if isinstance(given, list | tuple) else [given]))


def _image(image: object) -> bytes | str:
    """An image is its bytes, a path, a data URL, or an object that holds one of these."""
    if isinstance(image, Mapping):
        held = [image.get(name) for name in ("bytes", "image", "path", "url")]
        image = next((one for one in held if one), None)
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, str) and image.startswith("data:"):
        try:
            return base64.b64decode(image.partition("base64,")[2], validate=True)
        except ValueError as error:  # also where it is not ASCII
            raise UserError(f"an image's data URL is corrupt: {error}") from error
    if isinstance(image, str) and image:
        return image.removeprefix("file://")
    raise UserError("an image has neither bytes nor a path")


def _id(values: Mapping[str, Any]) -> str | None:
    for name in ("id", "pid", "question_id"):
        value = values.get(name)
        if isinstance(value, int | str) and str(value).strip():
            return str(value)
    return None


def _text(values: Mapping[str, Any], *names: str) -> str:
    """The first of the columns that is there."""
    for name in names:
        if values.get(name) is not None:
            return _plain_text(values[name], name)
    raise UserError(f"the row has no {' or '.join(names)}")


def _plain_text(value: object, name: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{name} is no text but {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{name} is empty")
    return _bounded(value)


def _optional_text(values: Mapping[str, Any], *names: str) -> str:
    found = (values.get(name) for name in names)
    return next((text for text in found if isinstance(text, str)), "")


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise UserError(f"a text has more than {MAX_TEXT} characters")
    return text


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{name} is no list")
    return list(value)
