"""Servers, a policy's stream and a connection for tests of pushed weights: all follow a script."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.rollout.fingerprints import Fingerprints
from perl_megatron.rollout.hand_over import HandOver
from perl_megatron.rollout.weight_push import Pushed, WeightPusher

NAMES = [f"model.layers.{number}.weight" for number in range(6)]
TENSORS = [(name, TensorInfo((3, 2 + number), torch.float32)) for number, name in enumerate(NAMES)]
LONG = 20.0


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


def wait_for_threads() -> None:
    """Of deliveries that were given up: they end at their next step."""
    for thread in threading.enumerate():
        if thread.name.startswith("weights to "):
            thread.join(LONG)


def assert_has(server: ScriptedServer, stream: Stream) -> None:
    assert list(server.got) == NAMES
    assert all(torch.equal(server.got[name], stream.tensor(name)) for name in NAMES)
    assert server.steps[-2:] == ["resume", "update_weight_version"]
