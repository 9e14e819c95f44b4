"""One pass over the weights into scripted servers: what each gets, who is left behind, what is refused."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted_push import (
    LONG,
    NAMES,
    ScriptedServer,
    ScriptedTransfer,
    Stream,
    assert_has,
    on_disk,
    push,
    pusher_of,
    wait_for_threads,
)

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.errors import UserError

HEALTH = 1.0
"""Seconds that a server may hang; long enough for one that works on a busy machine."""


@pytest.fixture(autouse=True)
def scripted_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedTransfer, "made", [])
    module = SimpleNamespace(Transfer=ScriptedTransfer, PassingWeights=list, transport_name=lambda: "scripted")
    monkeypatch.setitem(sys.modules, "perl_megatron.rollout.vllm_transfer", module)


@pytest.mark.parametrize("kind", ["direct", "disk"])
def test_one_pass_brings_all_weights_to_all_servers(tmp_path: Path, kind: str) -> None:
    pusher = pusher_of(tmp_path, **(on_disk(tmp_path) if kind == "disk" else {}))
    servers = [ScriptedServer(name) for name in "abc"]
    for version in (1, 2):
        stream = Stream(version)
        pushed = push(pusher, stream, *servers, version=version)
        assert (pushed.failures, pushed.problems) == ({}, [])
        assert pushed.attest_seconds > 0
        assert stream.num_drawn == len(NAMES)
        for server in servers:
            assert_has(server, stream)
    assert len(ScriptedTransfer.made) == (3 if kind == "direct" else 0)  # a connection is kept
    pusher.close()
    assert all(transfer.is_closed for transfer in ScriptedTransfer.made)


@pytest.mark.parametrize("kind", ["direct", "disk"])
def test_what_arrives_otherwise_is_named_and_that_server_does_not_go_on(tmp_path: Path, kind: str) -> None:
    pusher = pusher_of(tmp_path, **(on_disk(tmp_path) if kind == "disk" else {}))
    good, bad = ScriptedServer("good"), ScriptedServer("bad")
    bad.spoil = lambda got: (got.pop(NAMES[0]), got[NAMES[3]].add_(1))
    pushed = push(pusher, Stream(1), good, bad)
    assert pushed.problems == [
        f"{name}: it did not arrive as it was sent (worker 0) of http://bad" for name in (NAMES[0], NAMES[3])
    ]
    assert (good.steps[-1], bad.steps[-1]) == ("update_weight_version", "perl_conclude")


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({"attestation": "full"}, [True] * 4),
        ({"attestation": "sample", "full_attestation_every": 3}, [True, False, False, True]),
        ({"attestation": "sample", "full_attestation_every": 0}, [False] * 4),
        ({"attestation": "off", "full_attestation_every": 0}, [False] * 4),
    ],
)
def test_how_much_is_compared(tmp_path: Path, settings: dict[str, Any], full: list[bool]) -> None:
    pusher, server = pusher_of(tmp_path, **settings), ScriptedServer("a")
    attests = settings["attestation"] != "off"
    for version, expected in enumerate(full):
        push(pusher, Stream(version), server, version=version)
        assert server.expected == (version, expected, attests)
    if settings.get("full_attestation_every") == 3:
        push(pusher, Stream(9), server, ScriptedServer("new"), version=9)
        assert server.expected == (9, True, True)  # the other one was never compared in full


@pytest.mark.parametrize("step", ["join", "pause", NAMES[3]])
def test_a_server_that_hangs_is_left_behind_and_the_others_get_all(tmp_path: Path, step: str) -> None:
    release = threading.Event()

    def hang(now: str) -> None:
        if now == step:
            release.wait(LONG)

    pusher, stream = pusher_of(tmp_path, health_deadline=HEALTH), Stream(1)
    stalled, good = ScriptedServer("stalled", hang), ScriptedServer("good")
    begin = time.monotonic()
    pushed = push(pusher, stream, stalled, good)
    seconds = time.monotonic() - begin
    release.set()
    assert HEALTH <= seconds < 10
    assert list(pushed.failures) == ["http://stalled"]
    assert pushed.failures["http://stalled"].endswith(f"it took nothing for {HEALTH:g} s")
    assert stream.is_over
    assert_has(good, stream)
    assert "resume" not in stalled.steps


def test_a_server_that_joined_too_late_is_connected_anew(tmp_path: Path) -> None:
    """What came of the late connection is of no use: it was closed when the server was given up."""
    release = threading.Event()
    pusher = pusher_of(tmp_path, health_deadline=HEALTH)
    server = ScriptedServer("a", lambda step: None if step != "join" else (release.wait(LONG), None)[1])
    assert list(push(pusher, Stream(1), server).failures) == ["http://a"]
    release.set()
    until = time.monotonic() + LONG
    while not ScriptedTransfer.made[0].is_closed and time.monotonic() < until:
        time.sleep(0.01)
    stream = Stream(2)
    assert push(pusher, stream, server, version=2).failures == {}
    assert_has(server, stream)
    assert len(ScriptedTransfer.made) == 2


STEPS = ["pause", "join", "perl_expect", NAMES[2], "perl_conclude", "resume", "update_weight_version"]


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_fails_does_not_keep_the_others_and_is_connected_anew(tmp_path: Path, step: str) -> None:
    broken = [True]

    def fail(now: str) -> None:
        if now == step and broken[0]:
            raise OSError("connection reset")

    pusher, stream = pusher_of(tmp_path), Stream(1)
    bad, good = ScriptedServer("bad", fail), ScriptedServer("good")
    pushed = push(pusher, stream, bad, good)
    assert list(pushed.failures) == ["http://bad"]
    assert "connection reset" in pushed.failures["http://bad"]
    assert_has(good, stream)
    broken[0] = False
    if step not in ("pause", "join"):  # its workers do not wait on
        assert [each.is_closed for each in ScriptedTransfer.made if each.client is bad] == [True]
    again = Stream(2)
    assert push(pusher, again, bad, good, version=2).failures == {}
    assert_has(bad, again)
    assert_has(good, again)
    assert [each.client for each in ScriptedTransfer.made].count(good) == 1


def test_a_connection_that_worked_once_is_not_used_again_after_a_failure(tmp_path: Path) -> None:
    """Neither is one whose update broke off: who knows what lies in it."""
    broken = [False]

    def fail(now: str) -> None:
        if now == NAMES[2] and broken[0]:
            raise OSError("connection reset")

    pusher, server = pusher_of(tmp_path), ScriptedServer("a", fail)
    push(pusher, Stream(1), server)
    broken[0] = True
    assert list(push(pusher, Stream(2), server, version=2).failures) == ["http://a"]
    broken[0] = False
    assert push(pusher, Stream(3), server, version=3).failures == {}
    assert [each.is_closed for each in ScriptedTransfer.made] == [True, False]
    with pytest.raises(ValueError, match="weights did not come"):
        push(pusher, Stream(4, []), server, version=4)
    wait_for_threads()
    stream = Stream(5)
    assert push(pusher, stream, server, version=5).failures == {}
    assert_has(server, stream)
    assert [each.is_closed for each in ScriptedTransfer.made] == [True, True, False]


def test_nobody_is_waited_for_beyond_the_deadline(tmp_path: Path) -> None:
    release = threading.Event()
    pusher = pusher_of(tmp_path)
    slow = ScriptedServer("slow", lambda step: None if step != "perl_conclude" else (release.wait(LONG), None)[1])
    good = ScriptedServer("good")
    begin = time.monotonic()
    pushed = push(pusher, Stream(1), slow, good, seconds=1.5)
    assert 1.5 <= time.monotonic() - begin < 10
    release.set()
    says = "attest: it did not get done in time (rollout.sync_deadline)"
    assert pushed.failures == {"http://slow": says}
    assert good.steps[-1] == "update_weight_version"


SHUFFLED = [NAMES[1], NAMES[0], *NAMES[2:]]
STREAMS = {
    "another order": (SHUFFLED, rf"weight {NAMES[1]} came where {NAMES[0]} was due"),
    "another weight": ([*NAMES[:2], "other", *NAMES[3:]], rf"weight other came where {NAMES[2]} was due"),
    "one twice": ([NAMES[0], *NAMES], rf"weight {NAMES[0]} came where {NAMES[1]} was due"),
    "too many": ([*NAMES, "other"], "weight other came where the end was due"),
    "too few": (NAMES[:-2], rf"2 weights did not come: {NAMES[-2]}, {NAMES[-1]}"),
    "none": ([], r"6 weights did not come"),
}


@pytest.mark.parametrize("kind", ["direct", "disk"])
@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_that_is_not_the_policys_is_refused_and_drawn_to_its_end(tmp_path: Path, kind: str, case: str) -> None:
    """To its end, because it is collective: the other processes draw it too."""
    names, says = STREAMS[case]
    pusher = pusher_of(tmp_path, **(on_disk(tmp_path) if kind == "disk" else {}))
    server, stream = ScriptedServer("a"), Stream(1, names)
    with pytest.raises(ValueError, match=says):
        push(pusher, stream, server)
    assert (stream.num_drawn, stream.is_over) == (len(names), True)
    assert "resume" not in server.steps
    assert server.loaded == []
    assert not (tmp_path / "shared" / "weights-run-1").exists()
    wait_for_threads()
    good = Stream(2)
    assert push(pusher, good, server, version=2).failures == {}
    assert_has(server, good)


def test_a_disk_that_fails_ends_the_update_and_the_stream_is_drawn_to_its_end(tmp_path: Path) -> None:
    pusher = pusher_of(tmp_path, **on_disk(tmp_path))
    (tmp_path / "shared").write_text("a file where the folder should be")
    stream, server = Stream(1), ScriptedServer("a")
    with pytest.raises((OSError, UserError)):
        push(pusher, stream, server)
    assert stream.is_over
    assert server.loaded == []


def test_a_stream_that_raises_ends_the_update_with_its_error(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield NAMES[0], Stream(1).tensor(NAMES[0])
        raise RuntimeError("a rank is gone")

    server = ScriptedServer("a")
    with pytest.raises(RuntimeError, match="a rank is gone"):
        push(pusher_of(tmp_path), stream(), server)
    assert "resume" not in server.steps


def test_a_folder_is_a_checkpoint_and_only_the_last_of_the_run_stays(tmp_path: Path) -> None:
    pusher, server = pusher_of(tmp_path, **on_disk(tmp_path)), ScriptedServer("a")
    other, shared = pusher_of(tmp_path, **on_disk(tmp_path)), tmp_path / "shared"
    push(other, Stream(2), server, version=2, run="other")
    for version in (1, 2, 3):
        push(pusher, Stream(version), server, version=version, run="mine")
        assert sorted(path.name for path in shared.iterdir()) == [f"weights-mine-{version}", "weights-other-2"]
    assert server.loaded == ["weights-other-2", "weights-mine-1", "weights-mine-2", "weights-mine-3"]
    checkpoint = open_checkpoint(shared / "weights-mine-3")
    assert set(checkpoint) == set(NAMES)
    assert all(torch.equal(checkpoint[name], Stream(3).tensor(name)) for name in NAMES)
    assert json.loads((shared / "weights-mine-3" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    push(pusher, Stream(3), server, version=3, run="mine")  # brought again to a server that lost them
    assert_has(server, Stream(3))
    pusher.close()
    assert [path.name for path in shared.iterdir()] == ["weights-other-2"]


def test_what_servers_are_started_with(tmp_path: Path) -> None:
    assert pusher_of(tmp_path).transport_name() == "scripted"
    assert pusher_of(tmp_path, **on_disk(tmp_path)).transport_name() is None
