"""A client against a real HTTP server: order, concurrency, bounded memory, failures, and what no retry mends."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from scripted_endpoint import Said, ScriptedEndpoint, asked_text, failed

from perl_megatron.chat.client import LOOK_AHEAD, ChatClient
from perl_megatron.chat.messages import ChatReply, ChatRequest, Message
from perl_megatron.config.endpoint_section import EndpointConfig
from perl_megatron.errors import UserError

DEADLINE = 1.0
"""Seconds that every honest answer here comes within, also on a busy machine."""
LATE = Said(texts=("late",), wait=2 * DEADLINE)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


def request(text: str = "hello", **settings: object) -> ChatRequest:
    return ChatRequest(messages=(Message("user", (text,)),), max_tokens=20, **settings)  # type: ignore[arg-type]


def echo(body: dict) -> Said:
    return Said(texts=(asked_text(body),) * body["n"])


def ask_one(script: object, asked: ChatRequest | None = None, **settings: object) -> tuple[ChatReply, ScriptedEndpoint]:
    with ScriptedEndpoint(script) as endpoint:  # type: ignore[arg-type]
        config = EndpointConfig(url=endpoint.url, **{"retries": 2, "deadline": 60, **settings})  # type: ignore[arg-type]
        with ChatClient(config) as client:
            (reply,) = client.ask([asked or request()])
        return reply, endpoint


def first_fails(*failures: Said):
    left = list(failures)
    return lambda body: left.pop(0) if left else echo(body)


def test_replies_come_in_the_order_of_the_requests_while_several_are_under_way():
    gate = threading.Barrier(4, timeout=20)

    def script(body: dict) -> Said:
        gate.wait()  # nobody is answered before four have asked
        return Said(texts=(asked_text(body),), wait=0.05 * (4 - int(asked_text(body)) % 4))  # the last one first

    with (
        ScriptedEndpoint(script) as endpoint,
        ChatClient(EndpointConfig(url=endpoint.url, concurrency=4)) as client,
    ):
        replies = list(client.ask(request(str(number)) for number in range(8)))
    assert [reply.texts for reply in replies] == [(str(number),) for number in range(8)]
    assert endpoint.most_at_once == 4
    assert {(reply.finish_reasons, reply.error, reply.cached) for reply in replies} == {(("stop",), None, False)}
    assert {(reply.num_prompt_tokens, reply.num_completion_tokens) for reply in replies} == {(10, 1)}


def test_requests_are_taken_as_they_are_needed():
    taken = 0

    def requests() -> Iterator[ChatRequest]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield request(str(number))

    with ScriptedEndpoint(echo) as endpoint, ChatClient(EndpointConfig(url=endpoint.url, concurrency=2)) as client:
        replies = client.ask(requests())
        assert next(replies).texts == ("0",)
        assert taken <= 2 * LOOK_AHEAD
        replies.close()  # type: ignore[attr-defined]
        assert next(iter(client.ask([request("more")]))).texts == ("more",)  # the client is still of use


def test_what_is_sent_is_what_was_asked():
    asked = ChatRequest(
        messages=(Message("system", ("be ", "brief")), Message("user", ("hello",))),
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        num_samples=2,
    )
    reply, endpoint = ask_one(echo, asked)
    assert len(reply.texts) == 2
    assert endpoint.bodies == [
        {
            "model": "scripted",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "n": 2,
        }
    ]


def test_an_endpoint_that_gives_one_sample_at_a_time_is_asked_for_the_others():
    reply, endpoint = ask_one(lambda body: Said(texts=(str(body["seed"]),)), request(seed=5, num_samples=3))
    assert reply.texts == ("5", "6", "7")  # with other seeds, or all would be the same
    assert [body["n"] for body in endpoint.bodies] == [3, 2, 1]


@pytest.mark.parametrize(
    "failure",
    [
        failed(500),
        failed(503),
        Said(status=429, body=b"{}", headers={"Retry-After": "0.01"}),
        Said(body=b"<html>a gateway's page</html>", headers={"Content-Type": "text/html"}),
        Said(body=b'{"choices": [{"message": {"content": "cut'),
        Said(body=b'{"choices": 3}'),
        Said(body=b"[]"),
        Said(body=b"\xff\xfe"),
        LATE,
    ],
    ids=["500", "503", "429", "page", "cut", "wrong form", "list", "no text", "late"],
)
def test_what_may_pass_is_tried_again(failure):
    reply, endpoint = ask_one(first_fails(failure, failure), deadline=DEADLINE if failure is LATE else 60)
    assert (reply.texts, reply.error) == (("hello",), None)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (failed(500, "out of memory"), "out of memory"),
        (Said(body=b"{}"), "choices Field required"),
        (LATE, f"no answer within {DEADLINE:g} s, in 3 tries"),
    ],
)
def test_what_does_not_pass_is_an_error_of_that_request_alone(failure, reason):
    def script(body: dict) -> Said:
        return failure if asked_text(body) == "bad" else echo(body)

    with ScriptedEndpoint(script) as endpoint:
        config = EndpointConfig(url=endpoint.url, retries=2, deadline=DEADLINE if failure is LATE else 60)
        with ChatClient(config) as client:
            first, bad, last = client.ask([request("first"), request("bad"), request("last")])
    assert reason in bad.error
    assert not bad.error_is_lasting
    assert (bad.texts, bad.finish_reasons) == ((), ())
    assert (first.texts, last.texts) == (("first",), ("last",))
    assert Counter(map(asked_text, endpoint.bodies)) == {"first": 1, "bad": 3, "last": 1}


def test_an_answer_that_trickles_in_has_a_deadline_too():
    """Each byte comes in time; all of them would take half a minute."""
    started = time.monotonic()
    reply, _ = ask_one(lambda body: Said(texts=("slow",), pause=0.2), deadline=0.5, retries=0)
    assert "no answer within 0.5 s" in reply.error
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (failed(400, "the prompt is too long"), "the prompt is too long"),
        (Said(texts=(None,), refusal="I cannot help with that"), "I cannot help with that"),
        (Said(texts=("half",), finish_reason="content_filter"), "content filter"),
        (Said(texts=()), "no reply"),
    ],
)
def test_a_refusal_is_not_asked_again(said, reason):
    reply, endpoint = ask_one(lambda body: said)
    assert reason in reply.error
    assert reply.error_is_lasting == (said.texts != () or said.status == 400)
    assert len(endpoint.bodies) == 1


def test_an_empty_text_is_a_reply():
    reply, _ = ask_one(lambda body: Said(texts=(None,), finish_reason="length"))
    assert (reply.texts, reply.finish_reasons, reply.error) == (("",), ("length",), None)


def test_hosted_models_with_another_name_for_the_limit():
    def script(body: dict) -> Said:
        if "max_tokens" in body:
            return failed(400, "use max_completion_tokens", param="max_tokens")
        return echo(body)

    with ScriptedEndpoint(script) as endpoint, ChatClient(EndpointConfig(url=endpoint.url, concurrency=1)) as client:
        assert [reply.error for reply in client.ask([request("a"), request("b")])] == [None, None]
    assert [body.get("max_completion_tokens") for body in endpoint.bodies] == [None, 20, 20]  # asked wrongly once


@pytest.mark.parametrize(
    ("said", "what", "fix"),
    [
        (failed(401, "bad key secret-secret-secret"), "bad key …", "api_key_file"),
        (failed(403), "scripted", "api_key_file"),
        (failed(404, "no model"), "no model", "/v1"),
        (failed(429, "pay", code="insufficient_quota"), "pay", "nothing left to spend"),
    ],
)
def test_what_no_retry_mends_ends_the_run(tmp_path: Path, said, what, fix):
    key = tmp_path / "key"
    key.write_text("secret-secret-secret\n")
    with pytest.raises(UserError) as caught:
        ask_one(lambda body: said, api_key_file=key, retries=0)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert "endpoint.url = http://127.0.0.1:" in caught.value.where
    assert "secret" not in str(caught.value)


def test_nobody_there():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, so nobody else gets it; not listening, so connections are refused
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with ChatClient(EndpointConfig(url=url, model="any", retries=1)) as client:
            with pytest.raises(UserError, match="no connection") as caught:
                next(client.ask([request(), request()]))
            assert url in caught.value.where


def test_an_endpoint_that_goes_away_fails_its_requests():
    endpoint = ScriptedEndpoint(echo)
    with ChatClient(EndpointConfig(url=endpoint.url, retries=0, deadline=5)) as client:
        assert next(client.ask([request()])).error is None
        endpoint.script = lambda body: Said(body=b"", headers={"Connection": "close"})
        next(client.ask([request()]))
        endpoint.close()
        assert "no connection" in next(client.ask([request()])).error


@pytest.mark.parametrize("models", [(), ("a", "b")])
def test_a_model_has_to_be_named_where_there_is_not_just_one(models):
    with ScriptedEndpoint(echo, models) as endpoint, ChatClient(EndpointConfig(url=endpoint.url)) as client:
        with pytest.raises(UserError, match=f"lists {len(models)} models") as caught:
            next(client.ask([request()]))
        assert "endpoint.model" in caught.value.fix
        with ChatClient(EndpointConfig(url=endpoint.url, model="b")) as other:
            assert next(other.ask([request()])).error is None
    assert endpoint.bodies[-1]["model"] == "b"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host/v1", "http://user:word@host/v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="is not an address"):
        ChatClient(EndpointConfig(url=url))


def test_only_the_config_says_which_key_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-the-environment")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    _, endpoint = ask_one(echo)
    assert endpoint.keys == ["Bearer none"]
    assert "of-the-environment" not in str(endpoint.headers)
    key = tmp_path / "key"
    key.write_text("secret-secret-secret\n")
    _, endpoint = ask_one(echo, api_key_file=key)
    assert endpoint.keys == ["Bearer secret-secret-secret"]
