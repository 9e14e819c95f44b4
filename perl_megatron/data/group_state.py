"""Groups as JSON and back: what a checkpoint keeps of groups that wait for the next step."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from perl_megatron.data.permutation import apply_order
from perl_megatron.types import EncodedPrompt, Group, Record, Rollout, View

_RECORD = TypeAdapter(Record)
ARRAYS = ("token_ids", "logprob_rollout", "weight_versions")


def group_to_json(group: Group) -> dict[str, Any]:
    """The record, the orders of its views, and its scored rollouts, whose numbers stay the same bit for bit.

    Only what is there when a group has been scored: log-probabilities of the trainer and advantages come later.
    """
    return {
        "record": record_to_json(group.record),
        "orders": [list(view.order) for view in group.views],
        "rollouts": [_rollout_to_json(rollout) for rollout in group.rollouts],
    }


def group_from_json(state: dict[str, Any], encode: Callable[[View], EncodedPrompt]) -> Group:
    """The inverse; views and prompts are made anew. Raises UserError as ``encode`` does (an image that is gone)."""
    record = record_from_json(state["record"])
    views = tuple(apply_order(record, order, index) for index, order in enumerate(state["orders"]))
    rollouts = [
        Rollout(**{**saved, **{name: _array_from_json(saved[name]) for name in ARRAYS}}) for saved in state["rollouts"]
    ]
    return Group(record, views, tuple(encode(view) for view in views), rollouts)


def record_to_json(record: Record) -> dict[str, Any]:
    """A record alone."""
    return _RECORD.dump_python(record, mode="json")


def record_from_json(state: dict[str, Any]) -> Record:
    """The inverse."""
    return _RECORD.validate_python(state)


def _rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    later = (rollout.logprob_old, rollout.logprob_ref, rollout.importance, rollout.kl_penalty, rollout.advantage)
    assert all(value is None for value in later), "a group that waits was not trained on yet"
    return {
        "view_index": rollout.view_index,
        "finish_reason": rollout.finish_reason,
        "text": rollout.text,
        "readable": rollout.readable,
        "reward_parts": rollout.reward_parts,
        "reward": rollout.reward,
        **{name: _array_to_json(getattr(rollout, name)) for name in ARRAYS},
    }


def _array_to_json(array: np.ndarray) -> dict[str, str]:
    packed = zlib.compress(np.ascontiguousarray(array).tobytes(), level=1)
    return {"dtype": array.dtype.str, "zlib": base64.b64encode(packed).decode("ascii")}


def _array_from_json(saved: dict[str, str]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(saved["zlib"])), dtype=np.dtype(saved["dtype"])).copy()
