"""Optimizer states are brought where they are written, in one process (several: tests/distributed/actor_worker.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from actor_case import make_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from perl_megatron.checkpoint import state_gather
from perl_megatron.checkpoint.state import _sharded
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


def test_what_a_replica_writes_stays_untouched(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zeros of the others take no memory as long as nothing is written to them."""
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
