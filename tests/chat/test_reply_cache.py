"""Replies that are known are not asked for again; what is not whole, is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel
from scripted_endpoint import Said, ScriptedEndpoint, failed

from perl_megatron.chat.client import ChatClient
from perl_megatron.chat.messages import ChatReply, ChatRequest, Message
from perl_megatron.chat.reply_cache import ReplyCache
from perl_megatron.config.endpoint_section import EndpointConfig
from perl_megatron.errors import UserError

ASKED = ChatRequest((Message("user", ("hello",)),), max_tokens=20, seed=1, temperature=1.0)
REPLY = ChatReply(("a\u2028\ud800", "b"), ("stop", "length"), 3, 4, False, None)


class Other(BaseModel):
    text: str


def ask(endpoint: ScriptedEndpoint, cache: Path, *requests: ChatRequest, model: str = "") -> list[ChatReply]:
    with ChatClient(EndpointConfig(url=endpoint.url, model=model, cache=cache, retries=0)) as client:
        return list(client.ask(requests))


def count(body: dict) -> Said:
    count.calls += 1  # type: ignore[attr-defined]
    return Said(texts=(f"reply {count.calls}",) * body["n"])  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def endpoint():
    count.calls = 0  # type: ignore[attr-defined]
    with ScriptedEndpoint(count, ("one", "two")) as started:
        yield started


def test_a_known_reply_is_not_asked_again(endpoint, tmp_path: Path):
    (first,) = ask(endpoint, tmp_path / "cache", ASKED, model="one")
    (second,) = ask(endpoint, tmp_path / "cache", ASKED, model="one")
    assert second == replace(first, cached=True)
    assert not first.cached
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"messages": (Message("user", ("hullo",)),)},
        {"messages": (Message("system", ("hello",)),)},
        {"messages": (Message("user", ("hel", "lo")),)},
        {"max_tokens": 21},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 2},
        {"num_samples": 2},
        {"schema": {"type": "string"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_reply_counts(endpoint, tmp_path: Path, change):
    endpoint.script = lambda body: Said(texts=('"x"',) * body["n"])
    ask(endpoint, tmp_path, ASKED, model="one")
    ask(endpoint, tmp_path, replace(ASKED, **change), model="one")
    ask(endpoint, tmp_path, ASKED, model="two")
    assert len(endpoint.bodies) == 3


def test_images_count_by_what_they_show_not_where_they_are(endpoint, tmp_path: Path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    content = b"\x89PNG\r\n\x1a\nrest"
    first.write_bytes(content)
    second.write_bytes(content)
    asked = [replace(ASKED, messages=(Message("user", (image,)),)) for image in (first, second, content)]
    for request in asked:
        ask(endpoint, tmp_path / "cache", request, model="one")
    assert len(endpoint.bodies) == 1
    first.write_bytes(content + b"!")
    ask(endpoint, tmp_path / "cache", asked[0], model="one")
    assert len(endpoint.bodies) == 2


def test_a_sample_without_a_seed_is_a_new_one_each_time(endpoint, tmp_path: Path):
    for _ in range(2):
        ask(endpoint, tmp_path, replace(ASKED, seed=None), model="one")
    assert len(endpoint.bodies) == 2
    for _ in range(2):
        ask(endpoint, tmp_path, replace(ASKED, seed=None, temperature=0.0), model="one")
    assert len(endpoint.bodies) == 3


def test_equal_requests_under_way_are_asked_once(endpoint, tmp_path: Path):
    replies = ask(endpoint, tmp_path, *[ASKED] * 8, model="one")
    assert len(endpoint.bodies) == 1
    assert sorted(reply.cached for reply in replies) == [False] + [True] * 7


def test_failures_are_not_kept(endpoint, tmp_path: Path):
    endpoint.script = lambda body: failed(500)
    assert ask(endpoint, tmp_path, ASKED, model="one")[0].error is not None
    endpoint.script = count
    assert ask(endpoint, tmp_path, ASKED, model="one")[0].error is None
    assert len(endpoint.bodies) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", b'{"format": 1}', b"\xff", b"[" * 9999])
def test_an_entry_that_is_not_whole_is_asked_again(endpoint, tmp_path: Path, damage):
    ask(endpoint, tmp_path, ASKED, model="one")
    (file,) = tmp_path.glob("*/*.json")
    file.write_bytes(damage)
    assert not ask(endpoint, tmp_path, ASKED, model="one")[0].cached
    assert ask(endpoint, tmp_path, ASKED, model="one")[0].cached


@pytest.mark.parametrize(
    "spoil", [lambda entry: entry.update(digest="0"), lambda entry: entry["reply"].update(texts=[3])]
)
def test_an_entry_of_another_form_is_none(tmp_path: Path, spoil):
    cache = ReplyCache(tmp_path)
    cache.put("ab" * 32, REPLY)
    assert cache.get("ab" * 32) == replace(REPLY, cached=True)
    (file,) = tmp_path.glob("*/*.json")
    entry = json.loads(file.read_text())
    spoil(entry)
    file.write_text(json.dumps(entry))
    assert cache.get("ab" * 32) is None


def test_processes_share_a_folder(tmp_path: Path):
    program = """
import sys; from pathlib import Path
from perl_megatron.chat.reply_cache import ReplyCache; from perl_megatron.chat.messages import ChatReply
cache = ReplyCache(Path(sys.argv[1]))
for number in range(200):
    text = "x" * 5000
    cache.put("cd" * 32, ChatReply((text,), ("stop",), 1, 1, False, None))
    assert cache.get("cd" * 32).texts == (text,)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{'cd' * 32}.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        ReplyCache(tmp_path / "file" / "cache")
    assert "endpoint.cache" in caught.value.where
