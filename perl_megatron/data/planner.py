"""Which image orders a question is asked in (PeRL, Algorithm 1): the original and n_s permuted copies.

With probability α_t a record's copies are permuted; else they are the original again, so that every group has
(n_s + 1) · n rollouts. The released code draws the same order for every record and all its copies, which
``released_order`` does too; else every (seed, step, record, view) has a random stream of its own, and by default the
copies' orders are distinct and never the original.
"""

from __future__ import annotations

import random
from typing import Literal

import numpy as np

from perl_megatron.config.schema import PermutationConfig
from perl_megatron.data.permutation import apply_order, num_orders
from perl_megatron.errors import UserError
from perl_megatron.runtime.rng import generator
from perl_megatron.types import Record, View


def swap_probability(permutation: PermutationConfig, step: int, total_steps: int) -> float:
    """α of a 0-based step, in [0, 1].

    It rises linearly from 0 over the warm-up; then, with t steps done of the T after the warm-up, it is ``start`` times
    1 (constant), 1 - t/T (linear), 1 - c^(T-t) (exponential) or 1 - (t/T)^c (power). Raises ``UserError`` for an
    exponential schedule with c ≥ 1, which would be negative.
    """
    assert step >= 0
    coefficient = permutation.coefficient
    if permutation.schedule == "exponential" and coefficient >= 1:
        raise UserError(
            f"the exponential schedule 1 - c^(T-t) needs c < 1, not {coefficient}",
            where="permutation.coefficient",
            fix="set it to, for example, 0.98",
        )
    horizon = max(1, total_steps - permutation.warmup_steps)
    elapsed = min(max(0, step - permutation.warmup_steps), horizon)
    decay = {
        "constant": lambda: 1.0,
        "linear": lambda: 1 - elapsed / horizon,
        "exponential": lambda: 1 - coefficient ** (horizon - elapsed),
        "power": lambda: 1 - (elapsed / horizon) ** coefficient,
    }[permutation.schedule]()
    warmup = min(1.0, step / permutation.warmup_steps) if permutation.warmup_steps else 1.0
    return permutation.start * warmup * decay


def plan_views(
    record: Record,
    *,
    num_permuted: int,
    alpha: float,
    seed: int,
    step: int,
    orders: Literal["distinct", "independent", "released"] = "distinct",
) -> tuple[View, ...]:
    """The ``num_permuted`` + 1 views of a record in a step; view 0 is the original.

    One Bernoulli draw for the record and step decides whether the copies are permuted; copies of records that cannot be
    permuted are the original. What their orders are:

    - 'distinct': none is the original or another's. A record with fewer other orders than copies uses each of them, and
      then the same ones again in turn (two images have one other order).
    - 'independent': each is drawn uniformly from all orders, the original among them, as Algorithm 1 can be read.
    - 'released': all are ``released_order``'s, which also holds the one coin of all records.

    Text and answer follow the images in all three, by the record's contract.
    """
    identity = tuple(range(len(record.images)))
    chosen = [identity] * num_permuted
    if record.contract.permutable:
        released, coin = released_order(record)
        if orders != "released":
            coin = generator(seed, "swap", step, record.id).random()
        if coin < alpha and orders == "released":
            chosen = [released] * num_permuted
        elif coin < alpha and orders == "independent":
            streams = (generator(seed, "order", step, record.id, view) for view in range(1, num_permuted + 1))
            chosen = [_any_order(record, stream) for stream in streams]
        elif coin < alpha:
            drawn = _distinct_orders(record, num_permuted, (seed, "order", step, record.id))
            chosen = [drawn[copy % len(drawn)] for copy in range(num_permuted)]
    return tuple(apply_order(record, order, index) for index, order in enumerate([identity, *chosen]))


RELEASED_SEED = 42
"""What PeRL's released code seeds Python's generator with, again for every item."""


def released_order(record: Record) -> tuple[tuple[int, ...], float]:
    """The order of every copy under the released code's fixed seed, and the number that it compares with α.

    Known of the release: the seed is 42 and set again for every item; two images always become [1, 0] and three
    [1, 0, 2]; they are swapped until α falls below 0.025. Inferred: the generator is Python's, and shuffles the slots
    before it draws the number. That gives exactly these orders and 0.02501 for both sizes (the number drawn first would
    be 0.639, and three images [2, 1, 0]). With four to six slots the number is 0.24489. The release moves the images
    behind a text that it never edits; here the text follows, and only movable slots move.
    """
    python = random.Random(RELEASED_SEED)
    movable = sorted(record.contract.movable)
    shuffled = list(movable)
    python.shuffle(shuffled)
    return _with_moved(record, movable, shuffled), python.random()


def evaluation_views(record: Record, *, num_orders: int, seed: int) -> tuple[View, ...]:
    """Up to ``num_orders`` views of a record in distinct orders, the original first; the same ones at every call."""
    drawn = _distinct_orders(record, num_orders - 1, (seed, "evaluation", record.id))
    orders = [tuple(range(len(record.images))), *drawn]
    return tuple(apply_order(record, order, index) for index, order in enumerate(orders))


def _distinct_orders(record: Record, count: int, keys: tuple[int | str, ...]) -> list[tuple[int, ...]]:
    """``count`` distinct orders other than the original, or all that the record has, if these are fewer.

    The order of view v is drawn from the stream (``keys``, v): uniformly among those that no view before it has.
    """
    seed, *names = keys
    assert isinstance(seed, int)
    identity = tuple(range(len(record.images)))
    taken = [identity]
    for view in range(1, min(count, num_orders(record) - 1) + 1):
        stream = generator(seed, *names, view)
        order = identity
        while order in taken:
            order = _any_order(record, stream)
        taken.append(order)
    return taken[1:]


def _any_order(record: Record, stream: np.random.Generator) -> tuple[int, ...]:
    """An order of the movable slots, uniform among all of them."""
    movable = sorted(record.contract.movable)
    return _with_moved(record, movable, [int(slot) for slot in stream.permutation(movable)])


def _with_moved(record: Record, movable: list[int], moved: list[int]) -> tuple[int, ...]:
    slots = list(range(len(record.images)))
    for slot, old_slot in zip(movable, moved, strict=True):
        slots[slot] = old_slot
    return tuple(slots)
