"""JSON replies: asked for by `response_format` or in the prompt, found in what a model writes, corrected once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict
from scripted_endpoint import Said, ScriptedEndpoint, asked_text, failed

from perl_megatron.chat.client import ChatClient
from perl_megatron.chat.json_reply import find_document, is_strict, json_schema, parse_reply
from perl_megatron.chat.messages import ChatReply, ChatRequest, Message
from perl_megatron.config.endpoint_section import EndpointConfig


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    right: bool
    why: str


SCHEMA = {"type": "object", "properties": {"right": {"type": "boolean"}}, "required": ["right"]}
GOOD = '{"right": true, "why": "so"}'


def request(text: str = "judge", **settings: object) -> ChatRequest:
    return ChatRequest((Message("user", (text,)),), max_tokens=50, schema=Verdict, **settings)  # type: ignore[arg-type]


def ask(script: object, *requests: ChatRequest) -> tuple[list[ChatReply], list[dict]]:
    with (
        ScriptedEndpoint(script) as endpoint,  # type: ignore[arg-type]
        ChatClient(EndpointConfig(url=endpoint.url, retries=0, concurrency=1)) as client,
    ):
        return list(client.ask(requests)), endpoint.bodies


def test_the_schema_is_sent_and_the_reply_read():
    (reply,), (body,) = ask(lambda body: Said(texts=(GOOD,)), request(schema_name="verdict"))
    assert parse_reply(reply, Verdict) == Verdict(right=True, why="so")
    inner = {"name": "verdict", "schema": Verdict.model_json_schema(), "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": inner}


@pytest.mark.parametrize("bad", ['{"right": tr', '{"right": true}', '{"right": 3, "why": "x"}', "I think so.", ""])
def test_a_reply_that_is_not_valid_is_corrected_once(bad):
    (reply,), (first, second) = ask(
        lambda body: Said(texts=(GOOD if "not valid" in asked_text(body) else bad,)), request()
    )
    assert json.loads(reply.texts[0]) == {"right": True, "why": "so"}
    assert reply.num_completion_tokens == 2
    assert second["messages"][:-2] == first["messages"]
    assert second["messages"][-2] == {"role": "assistant", "content": bad}
    assert second["response_format"] == first["response_format"]


def test_a_reply_that_stays_invalid_is_an_error():
    (reply,), bodies = ask(lambda body: Said(texts=("no",), finish_reason="length"), request())
    assert "no valid JSON" in reply.error
    assert reply.error_is_lasting
    assert "max_tokens" in reply.error
    assert (reply.texts, len(bodies), reply.num_prompt_tokens) == ((), 2, 20)
    with pytest.raises(ValueError, match="no valid JSON"):
        parse_reply(reply, Verdict)


def test_of_several_samples_only_the_invalid_are_corrected():
    def script(body: dict) -> Said:
        return Said(texts=(GOOD, "bad", GOOD)) if body["n"] == 3 else Said(texts=('{"right": false, "why": "?"}',))

    (reply,), bodies = ask(script, request(num_samples=3))
    assert [json.loads(text)["right"] for text in reply.texts] == [True, False, True]
    assert [body["n"] for body in bodies] == [3, 1]


@pytest.mark.parametrize("status", [400, 422])
def test_an_endpoint_without_response_format_is_asked_in_the_prompt_ever_after(status):
    def script(body: dict) -> Said:
        if "response_format" in body:
            return failed(status, "unknown field response_format")
        return Said(texts=(f"Here it is:\n```json\n{GOOD}\n```",))

    replies, bodies = ask(script, request("a"), request("b"))
    assert [reply.texts for reply in replies] == [(GOOD,), (GOOD,)]
    assert ["response_format" in body for body in bodies] == [True, False, False]
    assert json.dumps(Verdict.model_json_schema()) in asked_text(bodies[1])
    assert asked_text(bodies[1]).startswith("a")


def test_a_request_that_is_wrong_in_itself_does_not_make_the_endpoint_simpler():
    def script(body: dict) -> Said:
        return failed(400, "the prompt is too long") if "long" in asked_text(body) else Said(texts=(GOOD,))

    replies, bodies = ask(script, request("long"), request("b"))
    assert ["too long" in (reply.error or "") for reply in replies] == [True, False]
    assert ["response_format" in body for body in bodies] == [True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f" \n{GOOD}\n",
        f"```json\n{GOOD}\n```",
        f'```\n{{"right": 1}}\n```\nNo, better:\n```\n{GOOD}\n```',
        f"<think>maybe {{}}</think>{GOOD}",
        f"The answer is {GOOD}, I believe.",
    ],
)
def test_the_document_is_found(text):
    assert find_document(text, Verdict) == (GOOD, None)
    assert find_document(text, SCHEMA) == (GOOD, None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "not a JSON object"),
        ('{"why": "x"}', "without right"),
        ('{"right": NaN}', "NaN"),
        ("[" * 9999, "not JSON"),
    ],
)
def test_what_a_bare_schema_is_checked_for(text, problem):
    document, found = find_document(text, SCHEMA)
    assert document == text
    assert problem in found


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(alphabet='{}[]"`:,\\ntrue1<>/hik'))
def test_any_text_is_read_or_refused(text):
    document, problem = find_document(text, Verdict)
    assert (problem is None) == _is_verdict(document)


def _is_verdict(text: str) -> bool:
    try:
        return bool(Verdict.model_validate_json(text))
    except ValueError:
        return False


def test_strictness_is_only_asked_for_where_the_schema_can_be_strict():
    assert is_strict(json_schema(Verdict))
    assert not is_strict(SCHEMA)
