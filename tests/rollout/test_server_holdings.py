"""Whether a server holds the policy at all, asked before it is brought weights."""

from __future__ import annotations

import time
from typing import Any

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout import server_survey
from perl_megatron.rollout.request_dispatch import Server
from perl_megatron.rollout.server_client import ServerFailure
from perl_megatron.rollout.server_survey import Found, Needs, Survey

SHAPES = {"first": (3, 2), "second": (4, 5)}
WHOLE = [["first", 0, 3, 0, 2], ["second", 0, 4, 0, 5]]
NEEDS = Needs(dtype="float32", max_model_length=10, num_rollouts=2, transport=None)
DESCRIPTION = {
    "dtype": "float32",
    "logprobs_mode": "processed_logprobs",
    "max_model_len": 10,
    "max_num_seqs": 2,
    "transport": None,
}


class PlacesServer:
    """Its workers hold these places; a text is the problem of a worker."""

    seconds = 60.0

    def __init__(self, *workers: list[list[Any]] | str, address: str = "http://a"):
        self.address, self.workers, self.num_asked = address, workers, 0
        self.identity = f"workers of {address}"
        self.failure: Exception | None = None

    def ask(self, path: str, *, seconds: float | None = None) -> Any:
        return {"health": None, "weight_info": {"weight_version": "default"}, "is_paused": {"is_paused": False}}[path]

    def call(self, method: str, *, seconds: float) -> list[Any]:
        assert seconds == self.seconds
        if method == "perl_describe":
            return [DESCRIPTION | {"identity": self.identity}]
        assert method == "perl_places"
        self.num_asked += 1
        if self.failure is not None:
            raise self.failure
        return [
            {"places": [], "problem": said} if isinstance(said, str) else {"places": said, "problem": None}
            for said in self.workers
        ]


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_survey, "POLL_SECONDS", 0.01)


def survey_of(*servers: PlacesServer, shapes: Any = SHAPES) -> Survey:
    clients: Any = {server.address: server for server in servers}
    return Survey([Server(address) for address in clients], clients, NEEDS, shapes)


def look(survey: Survey) -> tuple[list[Found], dict[str, str]]:
    return survey.look(phase="sync", until=time.monotonic() + 20)


@pytest.mark.parametrize("workers", [[WHOLE], [[WHOLE[0], ["second", 0, 4, 0, 3]], [WHOLE[0], ["second", 0, 4, 3, 2]]]])
def test_a_server_that_holds_all_is_asked_once_for_each_start(workers: list[Any]) -> None:
    server = PlacesServer(*workers)
    survey = survey_of(server)
    for _ in range(2):
        assert [each.identity for each in look(survey)[0]] == ["workers of http://a"]
    assert server.num_asked == 1
    server.identity = "after a restart"
    look(survey)
    assert server.num_asked == 2


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        ([WHOLE[1:]], "0 of the 6 numbers of first are held"),
        ([[WHOLE[0], ["second", 0, 4, 0, 4]]], "16 of the 20 numbers of second are held"),
        ([[*WHOLE, ["third", 0, 1, 0, 1]]], "third is not among the published weights"),
        ([[*WHOLE, ["first", 2, 1, 0, 2]]], "overlap"),
        ([WHOLE, "a parameter of another kind"], "a parameter of another kind"),
    ],
)
def test_a_server_of_another_model_is_refused(workers: list[Any], says: str) -> None:
    server = PlacesServer(*workers)
    survey = survey_of(server)
    for _ in range(2):  # and is not taken for known
        with pytest.raises(UserError, match="http://a is not what this run needs: its parameters are not") as caught:
            look(survey)
        assert says in caught.value.what
        assert caught.value.where == "rollout.attestation"
    assert server.num_asked == 2


def test_what_a_worker_says_is_not_mixed_with_what_is_missing_because_of_it() -> None:
    with pytest.raises(UserError) as caught:
        look(survey_of(PlacesServer("the only problem")))
    assert caught.value.what.endswith("its parameters are not understood: the only problem")


def test_a_server_that_is_restarted_as_another_model_is_done_without() -> None:
    good, other = PlacesServer(WHOLE), PlacesServer(WHOLE, address="http://b")
    survey = survey_of(good, other)
    look(survey)
    other.identity, other.workers = "y", ([WHOLE[0]],)
    found, failures = look(survey)
    assert [each.address for each in found] == ["http://a"]
    assert "0 of the 20 numbers of second are held" in failures["http://b"]


@pytest.mark.parametrize("failure", [ServerFailure("/collective_rpc: ConnectError"), KeyError("places")])
def test_a_server_that_dies_before_it_says_what_it_holds_is_done_without_and_asked_again(failure: Exception) -> None:
    good, dying = PlacesServer(WHOLE), PlacesServer(WHOLE, address="http://b")
    dying.failure = failure
    survey = survey_of(good, dying)
    found, failures = look(survey)
    assert [each.address for each in found] == ["http://a"]
    assert list(failures) == ["http://b"]
    dying.failure = None
    assert [each.address for each in look(survey)[0]] == ["http://a", "http://b"]
    assert (good.num_asked, dying.num_asked) == (1, 2)


def test_without_attestation_nobody_is_asked() -> None:
    server = PlacesServer([])
    assert look(survey_of(server, shapes=None))[1] == {}
    assert server.num_asked == 0
