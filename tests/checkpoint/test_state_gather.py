"""Optimizer states are brought where they are written, in one process (several: tests/distributed/actor_worker.py)."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from actor_case import make_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from perl_megatron.checkpoint import state_gather
from perl_megatron.checkpoint.state import _sharded
from perl_megatron.checkpoint.state_parts import StatePlanner
from perl_megatron.plan.host_memory import host_memory
from perl_megatron.train.actor import Actor


@pytest.fixture
def actor(case: Any, topology: Any, encoder: Any, sequences: Any) -> Actor:
    actor = Actor(make_config(case), topology, encoder, total_steps=10)
    actor.supervised_update(sequences)
    return actor


def described(actor: Actor) -> tuple[dict[str, Any], state_gather.GatheredStates]:
    content, _, states = _sharded(actor.modules, actor.optimizer.megatron, is_loading=False)
    apply_factories(content)
    return content, states


def states_in(content: dict[str, Any]) -> list[ShardedTensor]:
    parts = [part for part in nested_values(content) if isinstance(part, ShardedTensor)]
    return [part for part in parts if part.key.startswith("optimizer.state.")]


def test_what_others_write_stays_untouched(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_gather, "PIECE_BYTES", 4000)
    whole, states = described(actor)
    states.fill(whole)
    expected = [part.data.clone() for part in states_in(whole)]
    assert sum(bool(data.any()) for data in expected) > 100

    content, states = described(actor)
    count = iter(range(1000))

    def every_other(value: Any) -> Any:
        is_state = isinstance(value, ShardedTensor) and value.key.startswith("optimizer.state.")
        return replace(value, replica_id=next(count) % 2) if is_state else value

    dict_list_map_inplace(every_other, content)
    states.fill(content)
    for index, (part, right) in enumerate(zip(states_in(content), expected, strict=True)):
        assert part.replica_id == index % 2
        assert torch.equal(part.data, right if part.replica_id == 0 else torch.zeros_like(right))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_is_not_written_to_takes_no_memory() -> None:
    size = 64 << 20
    optimizer = SimpleNamespace(
        gbuf_ranges=[{torch.float32: []}], buffers=[SimpleNamespace(numel=size, numel_unpadded=size)]
    )
    states = state_gather.GatheredStates()
    before = resident_bytes()
    described = states._describe(optimizer)  # type: ignore[arg-type]
    assert resident_bytes() - before < 0.01 * 3 * 4 * size
    tensors = described[0][torch.float32]
    assert [tensors[name].shape for name in ("param", "exp_avg", "exp_avg_sq")] == [(size,)] * 3
    tensors["param"][: size // 4] = 1
    grown = resident_bytes() - before
    assert 0.9 * size < grown < 1.2 * size


def test_states_that_an_optimizer_has_not_made_yet(case: Any, topology: Any, encoder: Any) -> None:
    """Fused Adams make theirs in the first step; torch's are made by the shim of megatron_adam, undone here."""
    actor = Actor(make_config(case), topology, encoder, total_steps=10)
    content, states = described(actor)
    (part,) = getattr(actor.optimizer.megatron, "chained_optimizers", [actor.optimizer.megatron])
    part.optimizer.state.clear()
    states.fill(content)
    found = {part.key.split(".")[2]: part.data for part in states_in(content)}
    assert found["param"].any()
    assert not found["exp_avg"].any()
    assert not found["exp_avg_sq"].any()


def test_pieces_are_as_small_as_they_should_be(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    pieces = state_gather._pieces

    def noted(*arguments: Any) -> Any:
        for place, piece in pieces(*arguments):
            sizes.append(piece.untyped_storage().nbytes())
            yield place, piece

    monkeypatch.setattr(state_gather, "_pieces", noted)
    monkeypatch.setattr(state_gather, "PIECE_BYTES", 40_000)
    content, states = described(actor)
    states.fill(content)
    assert len(sizes) > 30
    assert max(sizes) == 40_000


def test_the_plan_knows_what_is_copied(actor: Actor, tmp_path: Path) -> None:
    """Once by parameters; the other copy is the buffers'. Objects (none here but the steps) are not counted."""
    content, metadata, states = _sharded(actor.modules, actor.optimizer.megatron, is_loading=False)
    described = {name: value for name, value in metadata.items() if name != "dp_cp_group"}
    parts = StatePlanner().copy_parts(content, described, states, tmp_path)
    copied = sum(
        tensor.untyped_storage().nbytes() for _, _, (_, tensors) in parts.writer.write_buckets for _, tensor in tensors
    )
    count = sum(parameter.numel() for module in actor.modules for parameter in module.parameters())
    planned = host_memory(
        num_parameters=count,
        num_trained=count,
        num_joined=0,
        wide=4,
        replicas=1,
        distributed=True,
        has_reference=False,
        process=0.0,
        engine=0.0,
    )
    assert copied == planned.checkpoint - planned.resume


def test_the_optimizer_keeps_nothing_of_it(actor: Actor) -> None:
    described(actor)
    (part,) = getattr(actor.optimizer.megatron, "chained_optimizers", [actor.optimizer.megatron])
    assert "get_parameter_state_dp_zero" not in vars(part)


def test_a_copy_that_would_stay_zero_is_found(actor: Actor) -> None:
    content, states = described(actor)
    dict_list_map_inplace(
        lambda value: (
            replace(value, data=value.data.clone())
            if isinstance(value, ShardedTensor) and value.key.startswith("optimizer.state.exp_avg.")
            else value
        ),
        content,
    )
    with pytest.raises(AssertionError, match=r"optimizer\.state\.exp_avg\..* is a copy"):
        states.fill(content)
