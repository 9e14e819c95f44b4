"""The servers of a run, as the first process knows them after a survey and a push that follow a script."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.errors import UserError
from perl_megatron.rollout import server_fleet
from perl_megatron.rollout.server_fleet import ServerFleet
from perl_megatron.rollout.server_survey import Found
from perl_megatron.rollout.weight_push import Pushed

ADDRESSES = ["http://a", "http://b", "http://c"]
SHAPES = {"model.layers.0.weight": (2, 3), "model.norm.weight": (4,)}
DEADLINE = 30.0


class ScriptedSurvey:
    """Finds all servers, with the weights that ``weights`` says, but those of ``failures``; or raises ``error``."""

    def __init__(self) -> None:
        self.weights = dict.fromkeys(ADDRESSES, "default")
        self.failures: dict[str, str] = {}
        self.error: Exception | None = None
        self.phases: list[str] = []

    def look(self, *, phase: str, until: float) -> tuple[list[Found], dict[str, str]]:
        assert 0 < until - time.monotonic() <= DEADLINE
        self.phases.append(phase)
        if self.error is not None:
            raise self.error
        there = [(number, address) for number, address in enumerate(ADDRESSES) if address not in self.failures]
        found = [Found(address, f"workers of {address}", self.weights[address], 10 + n) for n, address in there]
        return found, self.failures


class ScriptedPusher:
    """Draws the stream and answers ``pushed``; or raises ``error`` before."""

    def __init__(self) -> None:
        self.pushed, self.error = Pushed(), None
        self.calls: list[tuple[list[str], int, str]] = []
        self.got: dict[str, torch.Tensor] = {}
        self.is_closed = False

    def push(
        self, servers: dict[str, Any], weights: Iterable[tuple[str, torch.Tensor]], *, version: int, name: str, **_: Any
    ) -> Pushed:
        assert all(identity == f"workers of {client.address}" for identity, client in servers.items())
        self.calls.append(([client.address for client in servers.values()], version, name))
        if self.error is not None:
            raise self.error
        self.got = dict(weights)
        return self.pushed

    def close(self) -> None:
        self.is_closed = True


class Weights:
    """A policy's, in another dtype than the engine's; may be drawn again and again."""

    def __init__(self, names: Iterable[str] = SHAPES):
        self.names, self.num_drawn = list(names), 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.num_drawn += 1
        for name in self.names:
            yield name, torch.ones(SHAPES.get(name, (1,)), dtype=torch.float64)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``fleet._survey`` and ``fleet._pusher`` are scripted."""
    monkeypatch.setattr(server_fleet, "read_architecture", lambda path: None)
    monkeypatch.setattr(server_fleet, "published_shapes", lambda architecture: SHAPES)
    settings = {"engine": "server", "servers": ADDRESSES, "sync_deadline": DEADLINE}
    settings |= {"weight_transfer": "disk", "shared_folder": tmp_path}
    config = RolloutConfig.model_validate(settings)
    fleet: Any = ServerFleet(config, key=None, model_path=tmp_path, dtype=torch.float32, max_model_length=100)
    fleet._survey, fleet._pusher = ScriptedSurvey(), ScriptedPusher()
    yield fleet
    fleet.close()
    assert fleet._pusher.is_closed


def states(fleet: ServerFleet) -> list[tuple[bool, str]]:
    return [(server.is_ready, server.failure) for server in fleet.servers]


def test_servers_are_ready_that_were_found_and_took_the_weights(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert not any(server.is_ready for server in fleet.servers)
    fleet._survey.failures = {"http://a": "it is dead"}
    fleet._pusher.pushed = Pushed({"http://b": "pause: it hangs"}, [], attest_seconds=0.5)
    with caplog.at_level(logging.WARNING):
        report = fleet.update(Weights(), version=7)
    assert states(fleet) == [(False, "it is dead"), (False, "pause: it hangs"), (True, "")]
    assert [client.address for client in fleet.ready_clients()] == ["http://c"]
    assert [record.getMessage().split("server ")[1] for record in caplog.records] == [
        "http://a: it is dead",
        "http://b: pause: it hangs",
    ]
    assert fleet._pusher.calls == [(["http://b", "http://c"], 7, fleet.name)]
    assert (report.version, report.num_tensors, report.num_bytes, report.attest_seconds) == (7, 2, 40, 0.5)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in fleet._pusher.got.items()} == {
        name: (shape, torch.float32) for name, shape in SHAPES.items()
    }


def test_a_server_that_is_back_is_ready_again_and_the_smallest_one_bounds_the_sequences(fleet: Any) -> None:
    fleet._survey.failures = {"http://a": "it is dead"}
    fleet.update(Weights(), version=1)
    assert fleet.max_sequences == 11
    fleet._survey.failures = {}
    fleet.update(Weights(), version=2)
    assert states(fleet) == [(True, "")] * 3
    assert fleet.max_sequences == 10


def test_weights_are_brought_again_to_those_that_do_not_have_them(fleet: Any) -> None:
    weights = Weights()
    fleet.update(weights, version=3)
    fleet._survey.weights = {"http://a": fleet.name, "http://b": "default", "http://c": ""}
    report = fleet.bring("generate", everywhere=False)
    assert fleet._pusher.calls[1] == (["http://b", "http://c"], 3, fleet.name)
    assert (report.num_tensors, weights.num_drawn) == (2, 2)
    fleet._survey.weights = dict.fromkeys(ADDRESSES, fleet.name)
    report = fleet.bring("generate", everywhere=False)
    assert (report.num_tensors, report.version, weights.num_drawn, len(fleet._pusher.calls)) == (0, 3, 2, 2)
    assert fleet._survey.phases == ["sync", "generate", "generate"]
    fleet.update(weights, version=3)  # an update goes to all, whatever they say that they have
    assert fleet._pusher.calls[2] == (ADDRESSES, 3, fleet.name)


def test_weights_have_another_name_in_every_version_and_run(fleet: Any) -> None:
    names = set()
    for run in ("1", "2"):
        fleet._run = run
        for version in (1, 2):
            fleet.update(Weights(), version=version)
            names.add(fleet.name)
    assert names == {"1-1", "1-2", "2-1", "2-2"}


@pytest.mark.parametrize("phase", ["sync", "generate"])
def test_a_run_without_servers_ends_and_says_when_and_why(fleet: Any, phase: str) -> None:
    fleet._weights = Weights()
    fleet._survey.failures = {"http://a": "it is dead"}
    fleet._pusher.pushed = Pushed({"http://b": "pause: it hangs", "http://c": "attest: no"})
    with pytest.raises(UserError) as caught:
        fleet.bring(phase, everywhere=True)
    reasons = "http://a: it is dead; http://b: pause: it hangs; http://c: attest: no"
    assert caught.value.what == f"no server is left in the phase '{phase}': {reasons}"
    assert fleet.ready_clients() == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("no server is left in the phase 'sync'"), "no server is left in the phase 'sync'"),
        (KeyError("x"), "the servers could not be looked at: KeyError: 'x'"),
    ],
)
def test_a_survey_that_fails_ends_the_run(fleet: Any, error: Exception, says: str) -> None:
    fleet._survey.error = error
    with pytest.raises(UserError, match=says):
        fleet.update(Weights(), version=1)
    assert fleet._pusher.calls == []


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (UserError("the disk is full"), UserError, "^the disk is full"),
        (ValueError("weight x came where y was due"), ValueError, "weight x came"),
        (RuntimeError("a bug"), UserError, "the weights could not be brought: RuntimeError: a bug"),
    ],
)
def test_an_update_that_breaks_off_ends_the_run_and_no_server_is_asked_any_more(
    fleet: Any, error: Exception, kind: type[Exception], says: str
) -> None:
    fleet.update(Weights(), version=1)
    fleet._pusher.error = error
    with pytest.raises(kind, match=says):
        fleet.update(Weights(), version=2)
    assert states(fleet) == [(False, "an update of its weights broke off")] * 3


@pytest.mark.parametrize("names", [[*SHAPES, "other"], [*SHAPES, *SHAPES], list(SHAPES)[1:]])
def test_a_stream_that_is_not_the_policys_ends_the_run(fleet: Any, names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"other|twice|did not come"):
        fleet.update(Weights(names), version=1)
    assert fleet.ready_clients() == []


def test_what_servers_hold_otherwise_than_they_were_sent_ends_the_run(fleet: Any) -> None:
    fleet._pusher.pushed = Pushed({}, [f"difference {number}" for number in range(7)])
    with pytest.raises(UserError, match="after weight update 4 servers hold other numbers") as caught:
        fleet.update(Weights(), version=4)
    assert "in 7 places: difference 0; difference 1" in caught.value.what
    assert "difference 5" not in caught.value.what


def test_the_checkpoints_weights_are_brought_once_and_only_before_all_others(fleet: Any, tmp_path: Path) -> None:
    stored = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    save_file(stored, tmp_path / "model.safetensors")
    fleet.bring_first()
    fleet.bring_first()
    assert fleet._pusher.calls == [(ADDRESSES, 0, fleet.name)]
    assert list(fleet._pusher.got) == list(SHAPES)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in fleet._pusher.got.items())
    fleet.update(Weights(), version=5)
    fleet.bring_first()
    assert [version for _, version, _ in fleet._pusher.calls] == [0, 5]
    assert fleet.version == 5
