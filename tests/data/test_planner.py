import math
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from perl_megatron.config.schema import PermutationConfig
from perl_megatron.data.planner import evaluation_views, plan_views, released_order, swap_probability
from perl_megatron.errors import UserError
from perl_megatron.types import AnswerRule, PermutationContract, Record, ReferenceRule


def record(num_images: int, movable: tuple[int, ...] | None = None, name: str = "q") -> Record:
    return Record(
        id=name,
        images=tuple(Path(f"{slot}.png") for slot in range(num_images)),
        text="<image>" * num_images + "\nThe sum?",
        answer="7",
        contract=PermutationContract(tuple(range(num_images)) if movable is None else movable),
    )


def orders(views) -> list[tuple[int, ...]]:
    assert [view.index for view in views] == list(range(len(views)))
    return [view.order for view in views]


@pytest.mark.parametrize(
    ("schedule", "coefficient", "expected"),
    [
        ("constant", 2.0, [1, 1, 1, 1]),
        ("linear", 2.0, [1, 3 / 4, 1 / 2, 1 / 4]),
        ("power", 3.0, [1, 1 - 1 / 64, 1 - 1 / 8, 1 - 27 / 64]),
        ("exponential", 0.5, [1 - 1 / 16, 1 - 1 / 8, 1 - 1 / 4, 1 - 1 / 2]),
    ],
)
def test_schedules_are_the_papers(schedule, coefficient, expected):
    config = PermutationConfig(schedule=schedule, coefficient=coefficient)
    assert [swap_probability(config, step, 4) for step in range(4)] == pytest.approx(expected)
    scaled = PermutationConfig(schedule=schedule, coefficient=coefficient, start=0.6)
    assert [swap_probability(scaled, step, 4) for step in range(4)] == pytest.approx(
        [0.6 * value for value in expected]
    )
    late = PermutationConfig(schedule=schedule, coefficient=coefficient, warmup_steps=2)
    warm = [0, expected[0] / 2, *expected]
    assert [swap_probability(late, step, 6) for step in range(6)] == pytest.approx(warm)


def test_probabilities_stay_in_bounds():
    for schedule, coefficient in (("linear", 2), ("power", 0.5), ("exponential", 0.9)):
        for warmup in (0, 3, 10, 20):
            config = PermutationConfig(schedule=schedule, coefficient=coefficient, warmup_steps=warmup)
            assert all(0 <= swap_probability(config, step, 10) <= 1 for step in range(40))


def test_an_exponential_schedule_needs_a_base_below_one():
    with pytest.raises(UserError, match=r"permutation\.coefficient"):
        swap_probability(PermutationConfig(schedule="exponential"), 0, 10)


@pytest.mark.parametrize("num_images", [3, 4, 5])
def test_copies_have_distinct_new_orders(num_images):
    for step in range(200):
        planned = orders(plan_views(record(num_images), num_permuted=4, alpha=1.0, seed=1, step=step))
        assert planned[0] == tuple(range(num_images))
        assert len(planned) == len(set(planned)) == 5


def test_only_movable_slots_move():
    for step in range(100):
        planned = orders(plan_views(record(6, (4, 0, 3)), num_permuted=5, alpha=1.0, seed=1, step=step))
        assert len(set(planned)) == 6
        assert {tuple(order[slot] for slot in (1, 2, 5)) for order in planned} == {(1, 2, 5)}


def test_few_orders_are_used_in_turn():
    assert orders(plan_views(record(2), num_permuted=3, alpha=1.0, seed=0, step=0)) == [(0, 1)] + [(1, 0)] * 3
    planned = orders(plan_views(record(3), num_permuted=12, alpha=1.0, seed=0, step=0))
    assert set(planned[1:6]) == set(permutations(range(3))) - {(0, 1, 2)}
    assert planned[6:11] == planned[1:6]
    assert planned[11:] == planned[1:3]


@pytest.mark.parametrize("fixed", [record(0), record(1), record(3, ()), record(3, (1,))])
def test_immovable_records_keep_their_group_size(fixed):
    views = plan_views(fixed, num_permuted=2, alpha=1.0, seed=0, step=0)
    assert len(views) == 3
    assert not any(view.permuted for view in views)
    assert {(view.text, view.images) for view in views} == {(fixed.text, fixed.images)}
    assert len(evaluation_views(fixed, num_orders=4, seed=0)) == 1


def test_plain_grpo_has_one_view():
    assert orders(plan_views(record(3), num_permuted=0, alpha=1.0, seed=0, step=0)) == [(0, 1, 2)]


def test_alpha_is_the_share_of_permuted_records():
    trials = 1500
    for alpha in (0.0, 0.3, 1.0):
        swapped = 0
        for trial in range(trials):
            permuted = [
                view.permuted
                for view in plan_views(record(2, name=f"q{trial}"), num_permuted=2, alpha=alpha, seed=3, step=trial % 7)
            ]
            assert permuted in ([False, True, True], [False, False, False])  # one coin for all copies
            swapped += permuted[1]
        assert abs(swapped / trials - alpha) <= 5 * math.sqrt(alpha * (1 - alpha) / trials)


def test_orders_are_uniform():
    trials = 2000
    drawn = [orders(plan_views(record(3), num_permuted=2, alpha=1.0, seed=0, step=step)) for step in range(trials)]
    for copy in (1, 2):
        counts = Counter(planned[copy] for planned in drawn)
        assert len(counts) == 5
        assert all(abs(count - trials / 5) < 5 * math.sqrt(trials * 0.2 * 0.8) for count in counts.values())


def test_plans_depend_on_every_key_and_on_nothing_else():
    def plan(name="q", seed=0, step=0):
        return orders(plan_views(record(8, name=name), num_permuted=2, alpha=1.0, seed=seed, step=step))

    assert plan() == plan()
    different = [plan(), plan(name="r"), plan(seed=1), plan(step=1)]
    assert len({order for planned in different for order in planned[1:]}) == 8
    # A view's order does not depend on how many views are drawn after it.
    more = orders(plan_views(record(8), num_permuted=4, alpha=1.0, seed=0, step=0))
    assert more[:3] == plan()


def test_evaluation_orders_are_distinct_and_fixed():
    assert orders(evaluation_views(record(3), num_orders=1, seed=0)) == [(0, 1, 2)]
    evaluated = orders(evaluation_views(record(4), num_orders=6, seed=0))
    assert len(evaluated) == len(set(evaluated)) == 6
    assert evaluated[0] == (0, 1, 2, 3)
    assert evaluated == orders(evaluation_views(record(4), num_orders=6, seed=0))
    assert evaluated != orders(evaluation_views(record(4), num_orders=6, seed=1))
    assert set(orders(evaluation_views(record(3), num_orders=99, seed=0))) == set(permutations(range(3)))


def test_records_of_a_step_toss_their_own_coins_and_draw_their_own_orders():
    planned = [
        orders(plan_views(record(5, name=f"q{number}"), num_permuted=1, alpha=0.5, seed=0, step=3))[1]
        for number in range(100)
    ]
    assert 25 <= planned.count((0, 1, 2, 3, 4)) <= 75
    assert len(set(planned)) > 20


def test_independent_orders_are_drawn_from_all_of_them():
    """Uniform over all six, the original and repeats among them."""
    trials = 1200
    drawn = [
        orders(plan_views(record(3), num_permuted=2, alpha=1.0, seed=0, step=step, orders="independent"))
        for step in range(trials)
    ]
    for copy in (1, 2):
        counts = Counter(planned[copy] for planned in drawn)
        assert set(counts) == set(permutations(range(3)))
        assert all(abs(count - trials / 6) < 5 * math.sqrt(trials * 5 / 36) for count in counts.values())
    repeated = sum(planned[1] == planned[2] for planned in drawn)
    assert abs(repeated - trials / 6) < 5 * math.sqrt(trials * 5 / 36)


def released(num_images, alpha=1.0, movable=None, **keys):
    keys = {"seed": 0, "step": 0} | keys
    views = plan_views(record(num_images, movable), num_permuted=2, alpha=alpha, orders="released", **keys)
    return orders(views)[1:]


def test_released_orders_are_the_releases_whatever_the_seed_step_and_record():
    assert released(2) == released(2, seed=7, step=9) == [(1, 0)] * 2
    assert released(3) == [(1, 0, 2)] * 2
    assert [released(number)[0] for number in (4, 5, 6)] == [(2, 1, 3, 0), (3, 1, 2, 4, 0), (3, 1, 2, 4, 0, 5)]


def test_the_release_moves_only_movable_slots():
    assert released(4, movable=(3, 1)) == [(0, 3, 2, 1)] * 2
    assert released(3, movable=()) == [(0, 1, 2)] * 2


@pytest.mark.parametrize(("num_images", "until"), [(2, 0.025010755), (3, 0.025010755), (4, 0.244891853)])
def test_the_release_swaps_all_records_until_alpha_falls_below_its_one_coin(num_images, until):
    _, coin = released_order(record(num_images))
    assert coin == pytest.approx(until, abs=1e-9)
    identity = tuple(range(num_images))
    assert released(num_images, alpha=until + 1e-6)[0] != identity
    assert released(num_images, alpha=until - 1e-6)[0] == identity


def test_released_text_and_answer_follow_by_the_contract():
    contract = PermutationContract((0, 1, 2), answer=AnswerRule.INDEX, references=(ReferenceRule.INDEX,))
    images = tuple(Path(f"{slot}.png") for slot in range(3))
    text = "<image><image><image>Which one is not like image 1?"
    asked = Record("q", images, text, "2", answer_type="index", contract=contract)
    view = plan_views(asked, num_permuted=1, alpha=1.0, seed=0, step=0, orders="released")[1]
    assert [image.name for image in view.images] == ["1.png", "0.png", "2.png"]
    assert (view.text.removeprefix("<image>" * 3), view.answer) == ("Which one is not like image 2?", "1")
