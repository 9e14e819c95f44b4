"""What the engine makes of the servers that it finds, when one of them fails in between."""

from __future__ import annotations

from typing import Any

import pytest

from perl_megatron.errors import UserError
from perl_megatron.rollout import server_engine
from perl_megatron.rollout.dispatch import Server
from perl_megatron.rollout.server_client import ServerFailure
from perl_megatron.rollout.server_engine import ServerEngine
from perl_megatron.rollout.server_survey import Found

GOOD, OTHER = Found("http://good", "g", "default", 8), Found("http://other", "o", "default", 8)


class ScriptedPusher:
    """Finds this wrong with the servers of these identities."""

    def __init__(self, **errors: Exception):
        self.errors = errors

    def check_holdings(self, identity: str, client: str) -> None:
        assert client == f"client of {identity}"
        if identity in self.errors:
            raise self.errors[identity]


def survey_of(monkeypatch: pytest.MonkeyPatch, pusher: ScriptedPusher, *found: Found, **failures: str) -> Any:
    def survey(*args: Any, **settings: Any) -> tuple[list[Found], dict[str, str]]:
        return list(found), dict(failures)

    monkeypatch.setattr(server_engine, "survey", survey)
    engine: Any = object.__new__(ServerEngine)
    engine._servers = [Server(each.address) for each in (GOOD, OTHER)]
    engine._clients = {each.address: f"client of {each.identity}" for each in (GOOD, OTHER)}
    engine._pusher, engine._needs = pusher, None
    return engine._survey("sync", 0.0)


def test_what_is_found_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert survey_of(monkeypatch, ScriptedPusher(), GOOD, x="dead") == ([GOOD], {"x": "dead"})


def test_a_server_that_dies_before_it_says_what_it_holds_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pusher = ScriptedPusher(o=ServerFailure("/collective_rpc: ConnectError"))
    found, failures = survey_of(monkeypatch, pusher, OTHER, GOOD)
    assert found == [GOOD]
    assert failures == {"http://other": "/collective_rpc: ConnectError"}


@pytest.mark.parametrize(
    ("error", "says"),
    [(UserError("its parameters are not understood"), "not understood"), (TypeError("x"), "could not be looked at")],
)
def test_a_server_that_is_not_understood_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        survey_of(monkeypatch, ScriptedPusher(o=error), GOOD, OTHER)
