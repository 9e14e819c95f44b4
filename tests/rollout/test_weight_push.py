"""One pass over the weights into scripted servers: what each gets, who is left behind, what is refused."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.errors import UserError
from perl_megatron.rollout.fingerprints import Fingerprints
from perl_megatron.rollout.hand_over import HandOver
from perl_megatron.rollout.weight_push import Pushed, WeightPusher

NAMES = [f"model.layers.{number}.weight" for number in range(6)]
TENSORS = [(name, TensorInfo((3, 2 + number), torch.float32)) for number, name in enumerate(NAMES)]
LONG = 20.0
HEALTH = 1.0
"""Seconds that a server may hang; long enough for one that works on a busy machine."""


class Stream:
    """A policy's weights of a version; it notes how far it was drawn."""

    def __init__(self, version: int, names: list[str] = NAMES):
        self.version, self.names, self.num_drawn, self.is_over = version, names, 0, False

    def tensor(self, name: str) -> torch.Tensor:
        shape = dict(TENSORS)[name].shape if name in NAMES else (2, 2)
        return torch.full(shape, float(self.version)) + torch.arange(shape[0] * shape[1]).reshape(shape)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names:
            self.num_drawn += 1
            yield name, self.tensor(name)
        self.is_over = True


class ScriptedServer:
    """A client and all transports to it. ``act(step)`` is called at each step, and with each name of a weight."""

    seconds, sync_seconds = 1.0, LONG

    def __init__(self, name: str, act: Callable[[str], None] = lambda step: None):
        self.address, self.act = f"http://{name}", act
        self.steps: list[str] = []
        self.got: dict[str, torch.Tensor] = {}
        self.expected: tuple[int, bool, bool] | None = None
        self.loaded: list[str] = []
        self.spoil: Callable[[dict[str, torch.Tensor]], object] = lambda got: None

    def tell(self, path: str, body: Any = None, *, seconds: float | None = None, **query: str) -> None:
        self.act(path)
        self.steps.append(path)

    def ask(self, path: str) -> Any:
        assert path == "get_world_size"
        return {"world_size": 1}

    def call(self, method: str, *arguments: Any) -> list[Any]:
        self.act(method)
        self.steps.append(method)
        if method == "perl_expect":
            self.expected, self.got = arguments, {}  # type: ignore[assignment]
        if method == "perl_load_folder":
            checkpoint = open_checkpoint(arguments[0])
            self.loaded.append(Path(arguments[0]).name)
            self.got = {name: checkpoint[name] for name in checkpoint}
        if method != "perl_conclude":
            return [None]
        assert self.expected is not None
        version, full, attests = self.expected
        self.spoil(self.got)
        received = Fingerprints(version=version, full=full)
        for name, tensor in self.got.items():
            received.see(name, tensor)
        values = json.loads(json.dumps(received.values))
        return [{"problems": [], "received": values if attests else {}}]


class ScriptedTransfer:
    """Stands for vLLM's: one connection to a server's workers."""

    made: list[ScriptedTransfer] = []

    def __init__(self, client: ScriptedServer, source: Any, *, num_workers: int, seconds: float):
        self.client, self.is_closed = client, False
        self.made.append(self)
        client.act("join")

    def send(self, weights: HandOver[tuple[str, torch.Tensor]]) -> None:
        if self.is_closed:
            raise RuntimeError("the connection is closed")
        for name, tensor in weights:
            self.client.act(name)
            self.client.got[name] = tensor.clone()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def scripted_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedTransfer, "made", [])
    module = SimpleNamespace(Transfer=ScriptedTransfer, PassingWeights=list, transport_name=lambda: "scripted")
    monkeypatch.setitem(sys.modules, "perl_megatron.rollout.vllm_transfer", module)


def pusher_of(tmp_path: Path, **settings: Any) -> WeightPusher:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "torch_dtype": "float32"}))
    config = RolloutConfig.model_validate({"engine": "server", "health_deadline": LONG} | settings)
    return WeightPusher(config, TENSORS, model_path=model)


def on_disk(tmp_path: Path) -> dict[str, Any]:
    return {"weight_transfer": "disk", "shared_folder": tmp_path / "shared"}


def push(
    pusher: WeightPusher,
    stream: Any,
    *servers: ScriptedServer,
    version: int = 1,
    run: str = "run",
    seconds: float = LONG,
) -> Pushed:
    return pusher.push(
        {server.address: server for server in servers},  # type: ignore[misc]
        stream,
        version=version,
        name=f"{run}-{version}",
        deadline=time.monotonic() + seconds,
    )


def assert_has(server: ScriptedServer, stream: Stream) -> None:
    assert list(server.got) == NAMES
    assert all(torch.equal(server.got[name], stream.tensor(name)) for name in NAMES)
    assert server.steps[-1] == "resume"


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
    assert (good.steps[-1], bad.steps[-1]) == ("resume", "perl_conclude")


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


@pytest.mark.parametrize("step", ["pause", "join", "perl_expect", NAMES[2], "perl_conclude", "resume"])
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
    again = Stream(2)
    assert push(pusher, again, bad, good, version=2).failures == {}
    assert_has(bad, again)
    assert_has(good, again)


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
    assert good.steps[-1] == "resume"


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
    assert not (tmp_path / "shared" / "weights-run-1").exists()
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
    for version, run in ((1, "mine"), (5, "other"), (2, "mine"), (3, "mine")):
        push(pusher, Stream(version), server, version=version, run=run)
    shared = tmp_path / "shared"
    assert sorted(path.name for path in shared.iterdir()) == ["weights-mine-3", "weights-other-5"]
    assert server.loaded == ["weights-mine-1", "weights-other-5", "weights-mine-2", "weights-mine-3"]
    checkpoint = open_checkpoint(shared / "weights-mine-3")
    assert set(checkpoint) == set(NAMES)
    assert all(torch.equal(checkpoint[name], Stream(3).tensor(name)) for name in NAMES)
    assert json.loads((shared / "weights-mine-3" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    push(pusher, Stream(3), server, version=3, run="mine")  # brought again to a server that lost them
    assert_has(server, Stream(3))


def test_what_servers_are_started_with(tmp_path: Path) -> None:
    assert pusher_of(tmp_path).transport_name() == "scripted"
    assert pusher_of(tmp_path, **on_disk(tmp_path)).transport_name() is None
