"""Which servers are there: scripted ones that are, are not, come late, or are others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout import server_survey
from perl_megatron.rollout.request_dispatch import Server
from perl_megatron.rollout.server_client import Misfit, ServerFailure
from perl_megatron.rollout.server_survey import QUICK_SECONDS, Found, Needs, Survey

NEEDS = Needs(dtype="bfloat16", max_model_length=1000, num_rollouts=6, transport="nccl")
DESCRIPTION = {
    "identity": "abc",
    "dtype": "bfloat16",
    "logprobs_mode": "processed_logprobs",
    "max_model_len": 1000,
    "max_num_seqs": 6,
    "transport": "nccl",
}


UNSAID = object()


class ScriptedClient:
    """Of a server; ``failures`` are raised one after another by its health route, before it is there."""

    seconds = 60.0

    def __init__(
        self, address: str, *failures: Exception, weights: Any = "default", is_paused: Any = False, **changes: Any
    ):
        self.address, self.failures, self.weights, self.is_paused = address, list(failures), weights, is_paused
        self.description = {key: value for key, value in (DESCRIPTION | changes).items() if value is not UNSAID}
        self.health_seconds: list[float] = []

    def ask(self, path: str, *, seconds: float | None = None) -> Any:
        if path == "weight_info":
            return self.weights if isinstance(self.weights, dict | None) else {"weight_version": self.weights}
        if path == "is_paused":
            return self.is_paused if isinstance(self.is_paused, dict | None) else {"is_paused": self.is_paused}
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
    return look_again(Survey(servers, by_address(clients), needs, None), seconds)


def by_address(clients: Sequence[ScriptedClient]) -> Any:
    return {client.address: client for client in clients}


def look_again(survey: Survey, seconds: float = 20.0) -> tuple[list[Found], dict[str, str]]:
    return survey.look(phase="sync", until=time.monotonic() + seconds)


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
    look_again(Survey(servers, clients, NEEDS, None))
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
    with pytest.raises(UserError) as caught:
        look(ScriptedClient("http://good"), ScriptedClient("http://a", **changes))
    what = f"the server http://a is not what this run needs: it was started with other settings: {says}"
    assert (caught.value.what, caught.value.where) == (what, "rollout.servers")
    assert "perl-megatron serve" in str(caught.value.fix)


def test_more_than_is_needed_is_good_and_a_folder_needs_no_transport() -> None:
    over_a_folder = Needs("bfloat16", 1000, 6, None)
    client = ScriptedClient("http://a", max_model_len=2000, max_num_seqs=7, transport=None)
    assert look(client, needs=over_a_folder)[1] == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": None},
        {"weights": {}},
        {"is_paused": None},
        {"is_paused": {}},
        {"identity": UNSAID},
        {"dtype": UNSAID},
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


WRONG_KEY = Misfit(UserError("it does not take the key", where="rollout.api_key_file", fix="use the right one"))


def test_a_wrong_key_ends_the_run() -> None:
    """Also where other servers take it."""
    with pytest.raises(UserError) as caught:
        look(ScriptedClient("http://good"), ScriptedClient("http://a", WRONG_KEY))
    assert caught.value.what == "the server http://a is not what this run needs: it does not take the key"
    assert (caught.value.where, caught.value.fix) == ("rollout.api_key_file", "use the right one")


@pytest.mark.parametrize("wrong", [{"failure": WRONG_KEY}, {"changes": {"dtype": "float32"}}])
def test_later_the_run_goes_on_without_a_server_that_is_another_one(wrong: dict[str, Any]) -> None:
    """Someone started it anew, hours after the run began: the other servers do its work."""
    good, other = ScriptedClient("http://good"), ScriptedClient("http://other")
    clients = by_address([good, other])
    survey = Survey([Server(address) for address in clients], clients, NEEDS, None)
    assert look_again(survey)[1] == {}
    other.failures += [wrong["failure"]] if "failure" in wrong else []
    other.description = other.description | wrong.get("changes", {})
    found, failures = look_again(survey)
    assert [each.address for each in found] == ["http://good"]
    assert list(failures) == ["http://other"]
    assert failures["http://other"].startswith("it ")
    assert "is not what" not in failures["http://other"]


def test_servers_that_were_never_there_are_no_first_contact() -> None:
    """The first one that answers may still be wrong, and then the user can mend it at once."""
    with pytest.raises(UserError, match="http://a is not what this run needs"):
        look(ScriptedClient("http://a", ServerFailure("not yet"), WRONG_KEY))


def test_a_paused_server_has_no_weights() -> None:
    """It has their name and answers nothing, so they are brought again."""
    found, _ = look(
        ScriptedClient("http://a", weights="run-3", is_paused=True), ScriptedClient("http://b", weights="run-3")
    )
    assert [each.weights for each in found] == ["", "run-3"]
