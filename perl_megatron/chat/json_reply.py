"""JSON replies: what is asked for, found in what a model writes, and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from perl_megatron.chat.messages import ChatReply

Model = TypeVar("Model", bound=BaseModel)
Schema = Mapping[str, Any] | type[BaseModel]

_FENCED = re.compile(r"```(?:json|JSON)?\s*\n(.*?)```", re.DOTALL)
_SHOWN_CHARACTERS = 300


def parse_reply(reply: ChatReply, model: type[Model], sample: int = 0) -> Model:
    """The reply as an object of ``model``, which was the request's schema, or whose JSON schema was.

    Raises ``ValueError`` where the reply is an error, or is not what the model demands.
    """
    if reply.error is not None:
        raise ValueError(reply.error)
    return model.model_validate_json(reply.texts[sample])


def json_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema that a request's ``schema`` stands for."""
    return dict(schema) if isinstance(schema, Mapping) else schema.model_json_schema()


def is_strict(schema: Mapping[str, Any]) -> bool:
    """Whether endpoints with a strict mode can hold the model to it: every key is required, and no other allowed."""
    return schema.get("additionalProperties") is False and set(schema.get("required", ())) == set(
        schema.get("properties", ())
    )


def response_format(schema: Schema, name: str) -> dict[str, Any]:
    """The request's `response_format`."""
    content = json_schema(schema)
    inner = {"name": name, "schema": content, "strict": is_strict(content)}
    return {"type": "json_schema", "json_schema": inner}


def instruction(schema: Schema) -> str:
    """What the prompt says, where the endpoint takes no `response_format`."""
    content = json.dumps(json_schema(schema), ensure_ascii=False)
    return f"\n\nReply with one JSON document and nothing else. It has to be valid by this JSON schema:\n{content}"


def correction(problem: str) -> str:
    """What the model is told after a reply that was not valid."""
    return f"This reply is not valid: {problem}. Write it again: one valid JSON document and nothing else."


def find_document(text: str, schema: Schema) -> tuple[str, str | None]:
    """The JSON document in a text, and None, or the whole text and what is wrong with it.

    Models that were only asked to write JSON put it between fences, after their thoughts or into a sentence.
    """
    first_problem = None
    for candidate in _candidates(text):
        problem = _problem(candidate, schema)
        if problem is None:
            return candidate, None
        first_problem = first_problem or problem
    return text, first_problem


def _candidates(text: str) -> Iterator[str]:
    after_thoughts = text.rpartition("</think>")[2].strip()
    yield after_thoughts
    yield from (match.strip() for match in reversed(_FENCED.findall(after_thoughts)))
    for opening, closing in ("{}", "[]"):
        start, end = after_thoughts.find(opening), after_thoughts.rfind(closing)
        if 0 <= start < end:
            yield after_thoughts[start : end + 1]


def _problem(text: str, schema: Schema) -> str | None:
    if not isinstance(schema, Mapping):
        try:
            schema.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            return f"{place}: {first['msg']}" if place else first["msg"]
        return None
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"[:_SHOWN_CHARACTERS]
    if schema.get("type") == "object":
        if not isinstance(content, dict):
            return "not a JSON object"
        missing = [key for key in schema.get("required", ()) if key not in content]
        if missing:
            return f"without {', '.join(missing)}"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
