"""Which servers are there: scripted ones that are, are not, come late, or are others."""

from __future__ import annotations

import time
from typing import Any

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout import server_survey
from perl_megatron.rollout.dispatch import Server
from perl_megatron.rollout.server_client import ServerFailure
from perl_megatron.rollout.server_survey import QUICK_SECONDS, Found, Needs, survey

NEEDS = Needs(dtype="bfloat16", max_model_length=1000, num_rollouts=6, transport="nccl")
DESCRIPTION = {
    "identity": "abc",
    "dtype": "bfloat16",
    "logprobs_mode": "processed_logprobs",
    "max_model_len": 1000,
    "max_num_seqs": 6,
    "transport": "nccl",
}


class ScriptedClient:
    """Of a server; ``failures`` are raised one after another by its health route, before it is there."""

    seconds = 60.0

    def __init__(self, address: str, *failures: Exception, weights: Any = "default", **changes: Any):
        self.address, self.failures, self.weights = address, list(failures), weights
        self.description = DESCRIPTION | changes
        self.health_seconds: list[float] = []

    def ask(self, path: str, *, seconds: float | None = None) -> Any:
        if path == "weight_info":
            return self.weights if isinstance(self.weights, dict | None) else {"weight_version": self.weights}
        assert path == "health"
        assert seconds is not None
        self.health_seconds.append(seconds)
        if self.failures:
            raise self.failures.pop(0)
        return None

    def call(self, method: str, *, seconds: float) -> list[Any]:
        assert method == "perl_describe"
        return [self.description]


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_survey, "POLL_SECONDS", 0.01)


def look(*clients: ScriptedClient, seconds: float = 20.0, needs: Needs = NEEDS) -> tuple[list[Found], dict[str, str]]:
    servers = [Server(client.address) for client in clients]
    by_address: Any = {client.address: client for client in clients}
    return survey(servers, by_address, needs, phase="sync", until=time.monotonic() + seconds)


def test_those_that_are_there_and_why_the_others_are_not() -> None:
    good = ScriptedClient("http://a", weights="run-3", identity="x", max_num_seqs=64)
    found, failures = look(good, ScriptedClient("http://b", ServerFailure("it is dead")))
    assert found == [Found("http://a", "x", "run-3", 64)]
    assert failures == {"http://b": "it is dead"}


def test_one_is_waited_for_where_none_is_there() -> None:
    late = ScriptedClient("http://a", *[ServerFailure("not yet")] * 3)
    found, failures = look(late)
    assert [each.address for each in found] == ["http://a"]
    assert failures == {}
    assert len(late.health_seconds) == 4


def test_the_error_names_the_phase_and_every_server() -> None:
    begin = time.monotonic()
    never = [ScriptedClient(f"http://{name}", *[ServerFailure(f"{name} is off")] * 10_000) for name in "ab"]
    with pytest.raises(UserError, match="no server is left in the phase 'sync'") as caught:
        look(*never, seconds=0.1)
    assert 0.1 <= time.monotonic() - begin < 10
    assert "http://a: a is off; http://b: b is off" in caught.value.what
    assert caught.value.where == "rollout.servers"


def test_the_others_do_not_wait_long_for_one_that_failed_before() -> None:
    servers = [Server("http://a", is_ready=True), Server("http://b")]
    clients: Any = {server.address: ScriptedClient(server.address) for server in servers}
    survey(servers, clients, NEEDS, phase="sync", until=time.monotonic() + 20)
    assert clients["http://a"].health_seconds == [60.0]
    assert clients["http://b"].health_seconds == [QUICK_SECONDS]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float32"}, "dtype is float32, not bfloat16"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode is raw_logprobs, not processed_logprobs"),
        ({"max_model_len": 999}, "max_model_len is 999, not 1000"),
        ({"max_num_seqs": 5}, "max_num_seqs is 5, not 6"),
        ({"transport": "gloo"}, "transport is gloo, not nccl"),
        ({"transport": None}, "transport is None, not nccl"),
    ],
)
def test_a_server_with_other_settings_ends_the_run(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="was started with other settings") as caught:
        look(ScriptedClient("http://good"), ScriptedClient("http://a", **changes))
    assert f"the server http://a was started with other settings: {says}" == caught.value.what


def test_more_than_is_needed_is_good_and_a_folder_needs_no_transport() -> None:
    over_a_folder = Needs("bfloat16", 1000, 6, None)
    client = ScriptedClient("http://a", max_model_len=2000, max_num_seqs=7, transport=None)
    assert look(client, needs=over_a_folder)[1] == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": None},
        {"weights": {}},
        {"max_num_seqs": None},
        {"max_num_seqs": "many"},
        {"max_num_seqs": float("inf")},
        {"max_model_len": "long"},
    ],
)
def test_one_that_says_what_cannot_be_read_is_not_there(wrong: dict[str, Any]) -> None:
    found, failures = look(ScriptedClient("http://a"), ScriptedClient("http://b", **wrong))
    assert [each.address for each in found] == ["http://a"]
    assert "cannot be read" in failures["http://b"]


def test_a_wrong_key_ends_the_run() -> None:
    with pytest.raises(UserError, match="does not take the key"):
        look(ScriptedClient("http://a", UserError("the server does not take the key")))
