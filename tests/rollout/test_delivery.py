"""The weights of an update on their way to one server: the order of steps, and what becomes of each that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perl_megatron.rollout.delivery import Delivery, FolderTransport, Update
from perl_megatron.rollout.fingerprints import Fingerprints
from perl_megatron.rollout.hand_over import GivenUp, HandOver
from perl_megatron.rollout.server_client import ServerFailure

TENSOR = torch.arange(6.0).reshape(2, 3)
STEPS = [
    "pause?mode=abort&clear_cache=true",
    "connect",
    "perl_expect(7, False, True)",
    "send",
    "perl_conclude()",
    "reset_prefix_cache",
    "reset_mm_cache",
    "reset_encoder_cache",
    "resume",
    "update_weight_version(run-7)",  # last: a server that has the name serves
]
LONG = 20.0


class ScriptedServer:
    """Client and transport of a server; ``act(step)`` is called before each step is written down."""

    address, seconds, sync_seconds = "http://a", 1.0, 1.0

    def __init__(self, act: Callable[[str], None] = lambda step: None):
        self.act, self.steps, self.num_closed = act, [], 0
        self.received = Fingerprints(version=7, full=False)
        self.problems: list[list[str]] | None = [[], []]
        """Of each worker; None: they do not say."""

    def do(self, step: str) -> None:
        self.act(step)
        self.steps.append(step)

    def tell(self, path: str, body: Any = None, *, seconds: float | None = None, **query: str) -> None:
        asked = "&".join(f"{key}={value}" for key, value in query.items())
        self.do(path + (f"?{asked}" if asked else "") + (f"({body['new_version']})" if body else ""))

    def call(self, method: str, *arguments: Any) -> list[Any]:
        self.do(f"{method}({', '.join(map(str, arguments))})")
        if self.problems is None:
            return [None]
        return [{"problems": problems, "received": self.received.values} for problems in self.problems]

    def connect(self) -> ScriptedServer:
        self.do("connect")
        return self

    def send(self, weights: HandOver[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.received.see(name, tensor)
        self.do("send")

    def close(self) -> None:
        self.num_closed += 1


def delivery_to(server: ScriptedServer, *, attests: bool = True) -> Delivery:
    update = Update(version=7, name="run-7", full=False, attests=attests)
    if attests:
        update.sent.see("a", TENSOR)
    return Delivery(server, update, server.connect)  # type: ignore[arg-type]


def deliver(server: ScriptedServer, *, sent: torch.Tensor = TENSOR, attests: bool = True) -> Delivery:
    """To the end."""
    delivery = delivery_to(server, attests=attests)
    delivery.start()
    delivery.weights.put(("a", sent), seconds=LONG)
    delivery.weights.complete()
    delivery.join(LONG)
    assert not delivery.is_alive()
    return delivery


def test_the_steps_in_their_order() -> None:
    server = ScriptedServer()
    delivery = deliver(server)
    assert server.steps == STEPS
    assert (delivery.failure, delivery.problems, server.num_closed) == (None, [], 0)
    assert delivery.attest_seconds > 0


def test_what_arrived_otherwise_is_named_and_the_server_does_not_go_on() -> None:
    server = ScriptedServer()
    delivery = deliver(server, sent=TENSOR + 1)
    assert server.steps == STEPS[: STEPS.index("perl_conclude()") + 1]
    assert delivery.failure is None
    texts = [f"a: it did not arrive as it was sent (worker {worker})" for worker in (0, 1)]
    assert delivery.problems == texts


def test_what_one_worker_holds_otherwise_is_a_problem_also_without_fingerprints() -> None:
    server = ScriptedServer()
    server.problems = [[], ["the buffer b"]]
    delivery = deliver(server, attests=False)
    assert delivery.problems == ["the buffer b (worker 1)"]
    assert "resume" not in server.steps


def test_without_attestation_fingerprints_are_not_compared() -> None:
    server = ScriptedServer()
    server.received.see("unknown", TENSOR)
    assert deliver(server, attests=False).problems == []
    assert server.steps[2] == "perl_expect(7, False, False)"
    assert server.steps[-2:] == STEPS[-2:]


PHASES = ["pause", "connect", "begin the update", "send the weights", "attest"]
PHASES += ["drop the caches"] * 3 + ["resume"] * 2


@pytest.mark.parametrize(("step", "phase"), zip(STEPS, PHASES, strict=True))
@pytest.mark.parametrize("error", [ServerFailure("no"), KeyError("x"), RuntimeError()])
def test_an_error_names_the_phase_and_nothing_follows(step: str, phase: str, error: Exception) -> None:
    def act(now: str) -> None:
        if now == step:
            raise error

    server = ScriptedServer(act)
    delivery = deliver(server)
    assert server.steps == STEPS[: STEPS.index(step)]
    says = {"ServerFailure": "no", "KeyError": "KeyError: 'x'", "RuntimeError": "RuntimeError"}[type(error).__name__]
    assert delivery.failure == f"{phase}: {says}"
    assert server.num_closed == (STEPS.index(step) > STEPS.index("connect"))  # the workers do not wait on


def test_workers_that_answer_otherwise_are_a_failure() -> None:
    server = ScriptedServer()
    server.problems = None
    assert str(deliver(server).failure).startswith("attest: TypeError")


def abandoned_in(step: str) -> tuple[ScriptedServer, Delivery]:
    """Given up while the server stands in this step, which it then ends."""
    reached, go_on = threading.Event(), threading.Event()

    def act(now: str) -> None:
        if now == step:
            reached.set()
            assert go_on.wait(LONG)

    server = ScriptedServer(act)
    delivery = delivery_to(server)
    delivery.start()
    delivery.weights.put(("a", TENSOR), seconds=LONG)
    if STEPS.index(step) >= STEPS.index("send"):
        delivery.weights.complete()
    assert reached.wait(LONG)
    delivery.abandon("it took nothing for 2 s")
    assert delivery.failure is not None
    go_on.set()
    delivery.join(LONG)
    assert not delivery.is_alive()
    return server, delivery


@pytest.mark.parametrize(("step", "phase"), zip(STEPS, PHASES, strict=True))
def test_a_server_that_is_given_up_ends_at_its_next_step_for_the_reason_that_was_given(step: str, phase: str) -> None:
    server, delivery = abandoned_in(step)
    assert delivery.failure == f"{phase}: it took nothing for 2 s"
    assert (server.num_closed > 0) == (phase != "pause")  # also what was connected after that
    assert delivery.problems == []
    if phase != "resume":
        assert "resume" not in server.steps


def test_who_failed_by_itself_keeps_its_reason() -> None:
    def act(step: str) -> None:
        raise ServerFailure("it is dead")

    delivery = deliver(ScriptedServer(act))
    delivery.abandon("the stream of weights broke off")
    assert delivery.failure == "pause: it is dead"


def test_the_end_is_waited_for_but_not_that_of_one_that_is_given_up() -> None:
    go_on = threading.Event()
    server = ScriptedServer(lambda step: step == "resume" and go_on.wait(LONG))  # type: ignore[arg-type, return-value]
    delivery = delivery_to(server)
    delivery.start()
    delivery.weights.put(("a", TENSOR), seconds=LONG)
    delivery.weights.complete()
    begin = time.monotonic()
    delivery.conclude(until=begin + 0.2)
    assert 0.2 <= time.monotonic() - begin < LONG / 2
    says = "resume: it did not get done in time (rollout.sync_deadline)"
    assert (delivery.failure, server.num_closed) == (says, 1)
    delivery.conclude(until=time.monotonic() + LONG)
    assert time.monotonic() - begin < LONG / 2
    go_on.set()
    delivery.join(LONG)
    assert delivery.failure == says


def test_a_server_that_is_done_is_not_given_up_after_the_deadline() -> None:
    delivery = deliver(ScriptedServer())
    delivery.conclude(until=time.monotonic() - 1)
    assert delivery.failure is None


def test_a_server_that_gets_done_meanwhile_is_waited_for() -> None:
    server = ScriptedServer(lambda step: time.sleep(0.1) if step == "resume" else None)
    delivery = delivery_to(server)
    delivery.start()
    delivery.weights.put(("a", TENSOR), seconds=LONG)
    delivery.weights.complete()
    delivery.conclude(until=time.monotonic() + LONG)
    assert (delivery.failure, server.steps, server.num_closed) == (None, STEPS, 0)


class FolderClient:
    """Notes which folders it was told to load."""

    sync_seconds = 0.2

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def call(self, method: str, folder: str) -> list[None]:
        self.calls.append((method, folder))
        return [None]


def hand_over_of(*names: str) -> HandOver[tuple[str, torch.Tensor]]:
    """From a thread, complete."""
    weights = HandOver[tuple[str, torch.Tensor]]()

    def put() -> None:
        for name in names:
            weights.put((name, TENSOR), seconds=LONG)
        weights.complete()

    threading.Thread(target=put, daemon=True).start()
    return weights


def test_a_folder_is_loaded_when_it_is_written() -> None:
    client, is_written = FolderClient(), threading.Event()
    transport = FolderTransport(client, Path("/shared/weights-run-7"), is_written)  # type: ignore[arg-type]
    client.sync_seconds = LONG
    sending = threading.Thread(target=transport.send, args=[hand_over_of("a", "b")], daemon=True)
    sending.start()
    time.sleep(0.1)
    assert client.calls == []
    is_written.set()
    sending.join(LONG)
    assert client.calls == [("perl_load_folder", "/shared/weights-run-7")]


def test_a_folder_that_is_not_written_in_time_is_not_loaded() -> None:
    client = FolderClient()
    transport = FolderTransport(client, Path("/shared/x"), threading.Event())  # type: ignore[arg-type]
    with pytest.raises(ServerFailure, match="not written in time"):
        transport.send(hand_over_of("a"))
    assert client.calls == []


def test_a_folder_that_was_given_up_is_not_loaded() -> None:
    """It is called written then too, so that nobody waits for it."""
    client, is_written = FolderClient(), threading.Event()
    transport = FolderTransport(client, Path("/shared/x"), is_written)  # type: ignore[arg-type]
    client.sync_seconds = LONG
    weights = hand_over_of("a")
    errors: list[BaseException] = []

    def send() -> None:
        try:
            transport.send(weights)
        except GivenUp as error:
            errors.append(error)

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    time.sleep(0.05)
    weights.give_up("the stream of weights broke off")
    is_written.set()
    sending.join(LONG)
    assert [str(error) for error in errors] == ["the stream of weights broke off"]
    assert client.calls == []
