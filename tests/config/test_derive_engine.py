"""Which engine samples on which machine; every refusal names the option and what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
from derive_case import TINY

from perl_megatron.config.derive_engine import (
    check_serving,
    check_staleness,
    engine_replicas,
    engine_tensor_size,
    resolve_engine,
)
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError

SERVERS = ["rollout.engine=server", "rollout.servers=http://a:1,http://b:2"]
NUMBERS = replace(TINY, num_heads=12, num_kv_heads=4)


def config_of(*overrides: str) -> Config:
    return load_config(None, ["model.path=m", *overrides]).config


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretend that vLLM is installed, or is not."""
    find = importlib.util.find_spec

    def pretend(is_installed: bool) -> None:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (object() if is_installed else None) if name == "vllm" else find(name, *rest),
        )

    return pretend


@pytest.mark.parametrize(
    ("overrides", "is_installed", "engine"),
    [
        ([], True, "vllm"),
        ([], False, "embedded"),
        (["rollout.engine=vllm"], True, "vllm"),
        (["rollout.engine=embedded"], True, "embedded"),
        (SERVERS, True, "server"),
        ([*SERVERS, "rollout.weight_transfer=disk", "rollout.shared_folder=s"], False, "server"),
    ],
)
def test_the_engine(vllm: Callable[[bool], None], overrides: list[str], is_installed: bool, engine: str) -> None:
    vllm(is_installed)
    assert resolve_engine(config_of(*overrides)) == engine


def with_servers(text: str) -> list[str]:
    return ["rollout.engine=server", f"rollout.servers={text}"]


SHORT = ["rollout.request_deadline=10"]

REFUSED = [
    (["rollout.engine=vllm"], False, "vLLM is not installed", "rollout.engine", "rollout.engine=embedded"),
    (
        ["rollout.servers=http://a:1", "rollout.engine=vllm"],
        True,
        "the engine is vllm",
        "rollout.engine = vllm",
        "rollout.engine=server",
    ),
    (["rollout.servers=http://a:1"], True, "the engine is auto", "rollout.engine = auto", "rollout.servers=[]"),
    (["rollout.engine=server"], True, "no server to ask", "rollout.engine", "perl-megatron serve"),
    (with_servers("http://a:1,http://b,http://a:1/"), True, "named twice", "http://b", "once"),
    (
        [*SERVERS, "rollout.num_rollouts=9", "rollout.max_concurrent_sequences=8"],
        True,
        "all 9 rollouts of a view are one request, and a server takes at most 8",
        "rollout.num_rollouts, rollout.max_concurrent_sequences",
        "at least",
    ),
    ([*SERVERS, "rollout.weight_transfer=disk"], True, "not set", "rollout.weight_transfer", "rollout.shared_folder"),
    (SERVERS, False, "two ends", "rollout.weight_transfer = direct", "rollout.weight_transfer=disk"),
    (
        [*SERVERS, "rollout.request_deadline=600", "deadlines.generate=1200"],
        True,
        "may take 1200 s",
        "rollout.request_deadline = 600 (twice)",
        "set deadlines.generate above 1200",
    ),
    (
        [*SERVERS, *SHORT, "rollout.sync_deadline=100", "rollout.health_deadline=50", "deadlines.sync=300"],
        True,
        "may take 300 s",
        "deadlines.sync = 300",
        "set deadlines.sync above 300",
    ),
]


@pytest.mark.parametrize(("overrides", "is_installed", "what", "where", "fix"), REFUSED)
def test_refusals(
    vllm: Callable[[bool], None], overrides: list[str], is_installed: bool, what: str, where: str, fix: str
) -> None:
    vllm(is_installed)
    with pytest.raises(UserError) as caught:
        resolve_engine(config_of(*overrides))
    assert what in caught.value.what
    assert where in str(caught.value.where)
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.request_deadline=600", "deadlines.generate=1200.5"],
        [*SHORT, "rollout.sync_deadline=100", "rollout.health_deadline=50", "deadlines.sync=300.5"],
    ],
)
def test_deadlines_that_processes_wait_for_are_good(vllm: Callable[[bool], None], overrides: list[str]) -> None:
    vllm(True)
    assert resolve_engine(config_of(*SERVERS, *overrides)) == "server"


@pytest.mark.parametrize(
    "address",
    [
        *("a:8000", "127.0.0.1:8000", "ftp://a:1", "http://", "http://:8000", "http://a:0", "http://a:70000"),
        *("http://a:many", "http://user:word@a:1", "http://a:1?b=c", "http://a:1#b", "http://[::1"),
    ],
)
def test_what_is_no_address_of_a_server_is_refused(vllm: Callable[[bool], None], address: str) -> None:
    vllm(True)
    with pytest.raises(UserError, match="is not the address of a server") as caught:
        resolve_engine(config_of("rollout.engine=server", f"rollout.servers=http://good:1,{address}"))
    assert repr(address) in caught.value.what
    assert (caught.value.where, caught.value.fix) == ("rollout.servers", "write http://HOST:PORT")


@pytest.mark.parametrize("address", ["http://a:8000", "https://a", "http://127.0.0.1:1/", "http://[::1]:8000"])
def test_addresses(vllm: Callable[[bool], None], address: str) -> None:
    vllm(True)
    assert resolve_engine(config_of(*with_servers(address))) == "server"


def test_as_many_rollouts_as_a_server_takes_at_once_are_good() -> None:
    check_serving(config_of("rollout.num_rollouts=8", "rollout.max_concurrent_sequences=8").rollout)


AHEAD = "rollout.max_staleness=1"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [AHEAD, *SERVERS, "algorithm.old_policy=engine"],
        [AHEAD, *SERVERS, "algorithm.importance_correction=truncated"],
        [AHEAD, *SERVERS, "algorithm.importance_correction=masked"],
    ],
)
def test_staleness_that_the_objective_knows_of_is_good(overrides: list[str]) -> None:
    check_staleness(config_of(*overrides))


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        ([AHEAD], "only where an engine has processors of its own", "rollout.engine=server"),
        ([AHEAD, "rollout.engine=embedded"], "processors of its own", "rollout.max_staleness=0"),
        ([AHEAD, *SERVERS], "nothing in the objective would know", "algorithm.old_policy=engine"),
    ],
)
def test_staleness_that_nobody_knows_of_is_refused(overrides: list[str], what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        check_staleness(config_of(*overrides))
    assert what in caught.value.what
    assert "rollout.max_staleness = 1" in str(caught.value.where)
    assert fix in str(caught.value.fix)


def test_replicas_are_servers_or_parts_of_the_run() -> None:
    config = config_of(*SERVERS)
    assert engine_replicas(config, "server", 7) == 2
    assert engine_replicas(config, "vllm", 7) == 7


@pytest.mark.parametrize(
    ("overrides", "engine", "world_size", "size"),
    [
        (["rollout.tensor_parallel=4"], "embedded", 2, 1),
        (["rollout.tensor_parallel=4", *SERVERS], "server", 2, 1),
        (["rollout.tensor_parallel=4"], "vllm", 8, 4),
        (["parallel.tensor=2"], "vllm", 8, 2),
        ([], "vllm", 3, 1),
    ],
)
def test_processes_of_an_engine(overrides: list[str], engine: str, world_size: int, size: int) -> None:
    assert engine_tensor_size(config_of(*overrides), engine, world_size, NUMBERS) == size  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "world_size", "possible"), [(3, 12, "1, 2, 4"), (8, 8, "1, 2, 4"), (2, 3, "1")])
def test_an_engine_that_does_not_divide_is_refused_with_the_sizes_that_do(
    size: int, world_size: int, possible: str
) -> None:
    with pytest.raises(UserError, match=rf"an engine over {size} processes") as caught:
        engine_tensor_size(config_of(f"rollout.tensor_parallel={size}"), "vllm", world_size, NUMBERS)
    assert str(caught.value.fix) == f"sizes that do: {possible}"
