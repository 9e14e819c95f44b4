"""Servers that really die, hang, answer late or wrongly, or come back with old weights: nothing is lost, nothing twice.

Two real servers on loopback; the second one stands behind a proxy that can spoil its answers. Whatever happens to it,
the rollouts have to be those of the first one alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from faulty_proxy import FaultyProxy, changed, late
from servers import ServerProcess
from tiny_checkpoint import make_images, make_policy, make_view

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout.engine import Sampling, vllm_obstacle
from perl_megatron.rollout.server_survey import Needs

VLLM = vllm_obstacle(cuda=False)
pytestmark = [pytest.mark.skipif(VLLM is not None, reason=str(VLLM)), pytest.mark.timeout(1000)]

SAMPLED = Sampling(num_rollouts=3, temperature=1.0, top_p=1.0, max_tokens=10)
LONG = Sampling(num_rollouts=16, temperature=1.0, top_p=1.0, max_tokens=40)
HEALTH, REQUEST, SYNC = 60.0, 200.0, 300.0
"""Seconds that no server takes which does what it should, however busy the machine is."""
SHORT_HEALTH, SHORT_REQUEST = 6.0, 12.0
"""For servers that exceed them; another one that is well has to keep to them too."""


class Weights:
    """A policy's, to be drawn as often as needed."""

    def __init__(self, path):
        self.path, self.num_draws = path, 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.num_draws += 1
        checkpoint = open_checkpoint(self.path)
        return ((name, checkpoint[name]) for name in published_shapes(read_architecture(self.path)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for seed, name in enumerate(("a", "b")):
        make_policy(folder / name, seed=seed, scale=3.0, tie=True)
    make_images(folder / "images", [(28, 28), (56, 84), (100, 131), (30, 20)])
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    servers = [ServerProcess(folder / "servers", folder / "a") for _ in range(2)]
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def proxy(servers):
    proxy = FaultyProxy(servers[1].address)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def encoder(folder):
    return PromptEncoder(folder / "a", system_prompt="Think.")


@pytest.fixture(scope="module")
def asked(folder, encoder):
    """Twelve views of six records, as they come in a step, with their prompts and seeds."""
    import dataclasses

    images = sorted((folder / "images").iterdir())
    views = []
    for record in range(6):
        for index in range(2):
            shown = [images[(record + place + index) % 4] for place in range(1 + record % 3)]
            views.append(dataclasses.replace(make_view(shown, index=index), record_id=f"record {record}"))
    return views, [encoder.encode(view) for view in views], list(range(100, 112))


def engine_of(addresses, encoder, **settings):
    from perl_megatron.rollout.server_engine import ServerEngine
    from perl_megatron.runtime import environment

    environment.prepare_vllm(cuda=False)
    deadlines = {"health_deadline": HEALTH, "request_deadline": REQUEST, "sync_deadline": SYNC}
    config = RolloutConfig(
        engine="server", servers=tuple(addresses), max_concurrent_sequences=16, **(deadlines | settings)
    )
    return ServerEngine(
        config, encoder=encoder, model_path=encoder.model_path, dtype=torch.float32, max_model_length=192
    )


@pytest.fixture
def both(servers, proxy, encoder, request):
    """The engine on both servers; a parameter is its deadlines."""
    servers[1].wait()
    engine = engine_of([servers[0].address, proxy.address], encoder, **getattr(request, "param", {}))
    yield engine
    engine.close()


@pytest.fixture
def over():
    """To be set when a fault is over; it is at the end of the test."""
    over = threading.Event()
    yield over
    over.set()


@pytest.fixture(scope="module")
def expected(servers, encoder, asked, folder):
    """What the first server alone gives, by policy."""
    found = {}
    for name in ("a", "b"):
        engine = engine_of([servers[0].address], encoder)
        engine.update_weights(Weights(folder / name), version=1)
        found[name] = engine.generate(*asked[:2], SAMPLED, seeds=asked[2])
        engine.close()
    return found


def generate(engine, asked, sampling=SAMPLED):
    views, prompts, seeds = asked
    return engine.generate(views, prompts, sampling, seeds=seeds)


def assert_same(rollouts, expected, *, version):
    """Each view's rollouts once, in order, with the tokens of the same seeds."""
    assert [rollout.view_index for rollout in rollouts] == [rollout.view_index for rollout in expected]
    for rollout, reference in zip(rollouts, expected, strict=True):
        assert rollout.token_ids.tolist() == reference.token_ids.tolist()
        np.testing.assert_allclose(rollout.logprob_rollout, reference.logprob_rollout, atol=1e-5)
        assert set(rollout.weight_versions.tolist()) == {version}


def while_it_works(proxy, action):
    """The thread that does it, a moment after the second server is first asked for rollouts."""

    def wait_and_act():
        proxy.is_asked.wait()
        time.sleep(0.2)
        action()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread


def failure(engine):
    """Of the second server."""
    return engine._fleet.servers[1].failure


def test_both_servers_are_used_and_agree_with_one(both, proxy, asked, expected, folder):
    proxy.spoil = lambda answer: (200, answer)
    both.update_weights(Weights(folder / "b"), version=4)
    assert_same(generate(both, asked), expected["b"], version=4)
    assert 0 < proxy.num_spoiled < len(asked[0])


GARBAGE = {
    "not JSON": (lambda answer: (200, b"<html>"), "its answer cannot be read: JSONDecodeError"),
    "an error": (lambda answer: (500, b'{"error": "engine dead"}'), "status 500"),
    "a rollout too few": (changed(lambda content: content["choices"].pop()), "returned 2 rollouts instead of 3"),
    "a rollout twice": (
        changed(lambda content: content["choices"].append(content["choices"][0])),
        "returned 4 rollouts instead of 3",
    ),
    "another prompt": (changed(lambda content: content["prompt_token_ids"].pop()), "read another prompt"),
    "a token that is none": (
        changed(lambda content: content["choices"][0]["token_ids"].__setitem__(0, 10**9)),
        "token ids that the policy does not have",
    ),
    "a log-probability of nothing": (
        changed(lambda content: content["choices"][1]["logprobs"]["content"][2].update(logprob=float("nan"))),
        "log-probabilities that are none",
    ),
    "other weights": (
        changed(lambda content: content["choices"][0]["weight_versions"][0].update(version="default")),
        "sampled with the weights 'default'",
    ),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_asked_of_another_server(both, proxy, asked, expected, folder, kind):
    both.update_weights(Weights(folder / "a"), version=5)
    proxy.spoil, reason = GARBAGE[kind]
    assert_same(generate(both, asked), expected["a"], version=5)
    assert reason in failure(both)
    proxy.spoil = None
    both.update_weights(Weights(folder / "b"), version=6)
    assert failure(both) == ""
    assert_same(generate(both, asked), expected["b"], version=6)


@pytest.mark.parametrize("both", [{"request_deadline": SHORT_REQUEST}], indirect=True)
def test_a_late_answer_is_asked_of_another_server_and_not_counted(both, proxy, over, asked, expected, folder):
    """None of its answers comes before all are there."""
    both.update_weights(Weights(folder / "a"), version=5)
    proxy.spoil = late(over)
    begin = time.monotonic()
    assert_same(generate(both, asked), expected["a"], version=5)
    assert time.monotonic() - begin >= SHORT_REQUEST
    assert f"did not answer a request for rollouts within {SHORT_REQUEST:g} s" in failure(both)


@pytest.mark.parametrize("both", [{"health_deadline": SHORT_HEALTH}], indirect=True)
def test_a_server_that_hangs_is_done_without(both, proxy, over, servers, asked, expected, folder):
    """Frozen while it works: its health is asked for, so that nobody waits for the requests' longer deadline."""
    both.update_weights(Weights(folder / "b"), version=2)
    proxy.spoil = late(over)  # what it has answered by then comes no sooner than what it is at
    freezing = while_it_works(proxy, servers[1].freeze)
    try:
        begin = time.monotonic()
        rollouts = generate(both, asked, LONG)
        assert time.monotonic() - begin < REQUEST
        assert len(rollouts) == 16 * len(asked[0])
        freezing.join()
        assert_same(generate(both, asked), expected["b"], version=2)
        both.update_weights(Weights(folder / "a"), version=3)
        assert "/health was not answered within" in failure(both)
        assert_same(generate(both, asked), expected["a"], version=3)
    finally:
        freezing.join()
        servers[1].thaw()
    over.set()
    proxy.spoil = None
    servers[1].wait()
    both.update_weights(Weights(folder / "b"), version=4)
    assert failure(both) == ""
    assert_same(generate(both, asked), expected["b"], version=4)


@pytest.mark.parametrize("both", [{"health_deadline": SHORT_HEALTH}], indirect=True)
def test_a_server_that_hangs_during_an_update_does_not_keep_the_others(both, servers, asked, expected, folder):
    """Frozen when half of the weights are there: soon nobody waits for it, and the other server has them."""
    both.update_weights(Weights(folder / "a"), version=2)

    class Freezing(Weights):
        def __iter__(self):
            for number, item in enumerate(super().__iter__()):
                if number == 50:
                    servers[1].freeze()
                yield item

    try:
        begin = time.monotonic()
        both.update_weights(Freezing(folder / "b"), version=3)
        assert time.monotonic() - begin < SYNC
        assert f"send the weights: it took nothing for {SHORT_HEALTH:g} s" in failure(both)
        assert_same(generate(both, asked), expected["b"], version=3)
    finally:
        servers[1].thaw()
    servers[1].wait()
    both.update_weights(Weights(folder / "a"), version=4)
    assert failure(both) == ""
    assert_same(generate(both, asked), expected["a"], version=4)


def test_a_dead_server_is_done_without_and_brought_the_weights_when_it_is_back(
    both, proxy, over, servers, asked, expected, folder
):
    """Killed while it works; started again, it has the weights that it was first started with."""
    both.update_weights(Weights(folder / "b"), version=2)
    proxy.spoil = late(over, lambda answer: (502, b"what it has answered by then is lost too"))

    def kill():
        servers[1].kill()
        over.set()

    killing = while_it_works(proxy, kill)
    rollouts = generate(both, asked, LONG)
    assert len(rollouts) == 16 * len(asked[0])
    killing.join()
    proxy.spoil = None
    assert_same(generate(both, asked), expected["b"], version=2)
    both.update_weights(Weights(folder / "b"), version=3)
    assert "status 502" in failure(both)
    servers[1].start()
    servers[1].wait()
    assert_same(generate(both, asked), expected["b"], version=3)
    both.update_weights(Weights(folder / "b"), version=4)
    assert failure(both) == ""
    assert_same(generate(both, asked), expected["b"], version=4)


def test_the_only_server_comes_back_with_old_weights_in_the_middle_of_a_step(servers, encoder, asked, expected, folder):
    """It is brought the last weights again before it serves, and the step goes on; nobody else has to do anything."""
    engine = engine_of([servers[1].wait().address], encoder)
    weights = Weights(folder / "b")
    engine.update_weights(weights, version=9)
    assert_same(generate(engine, asked), expected["b"], version=9)
    servers[1].kill()
    servers[1].start()
    assert_same(generate(engine, asked), expected["b"], version=9)
    assert weights.num_draws == 2
    engine.close()


def test_without_any_server_the_phase_and_the_servers_are_named(servers, encoder, asked, folder):
    addresses = ["http://127.0.0.1:9", "http://127.0.0.1:10"]
    engine = engine_of(addresses, encoder, sync_deadline=2)
    with pytest.raises(UserError, match="no server is left in the phase 'sync'") as error:
        engine.update_weights(Weights(folder / "a"), version=1)
    assert all(address in str(error.value) for address in addresses)


def test_a_request_that_every_server_refuses_ends_the_run(servers, encoder, asked, folder):
    """It is the request's fault, not the servers': more images than they were started for."""
    engine = engine_of([servers[0].address], encoder)
    images = sorted((folder / "images").iterdir())
    view = make_view([images[0]] * 5)
    with pytest.raises(UserError, match=r"refuses the request.*At most 4 image") as error:
        engine.generate([view], [encoder.encode(view)], SAMPLED, seeds=[1])
    assert "record" in str(error.value)
    engine.close()


def test_a_server_with_other_settings_is_refused(servers, encoder, folder):
    engine = engine_of([servers[0].address], encoder)
    engine._fleet._survey._needs = Needs("bfloat16", 4096, 3, None)
    with pytest.raises(UserError, match=r"dtype is float32, not bfloat16; max_model_len is 192, not 4096"):
        engine.update_weights(Weights(folder / "a"), version=1)
    engine.close()
