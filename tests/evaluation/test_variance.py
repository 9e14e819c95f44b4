"""The split of the reward's variance: by hand, against a simulated policy with known components, exact sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.evaluation.variance import RewardCase, split_variance


def cases(table):
    """``table[question][order]`` is a list of rewards."""
    return [
        RewardCase(str(question), (order,), value)
        for question, orders in enumerate(table)
        for order, values in enumerate(orders)
        for value in values
    ]


def test_by_hand():
    """Two questions, two orders, two rollouts: means 1, 0.5 | 0, 0.5 around 0.5."""
    split = split_variance(cases([[[1, 1], [1, 0]], [[0, 0], [0, 1]]]), greedy=False)
    assert split.total_squares == 2.0
    assert split.question_squares == 8 * 0.25**2 == 0.5
    assert split.order_squares == 8 * 0.25**2 == 0.5
    assert split.sampling_squares == 4 * 0.5**2 == 1.0
    assert (split.question_freedom, split.order_freedom, split.sampling_freedom) == (1, 2, 4)
    assert split.sampling_variance == 0.25
    assert split.order_variance == (0.25 - 0.25) / 2
    assert split.question_variance == (0.5 - 0.25 - 0) / 4


def test_equal_numbers_give_the_textbook_formula():
    """σ²_E = MS_E, σ²_O = (MS_O - MS_E) / n, σ²_Q = (MS_Q - MS_O) / (m · n), for m orders of n rollouts each."""
    rewards = np.random.default_rng(0).normal(size=(7, 3, 4)) + np.arange(7)[:, None, None] + np.arange(3)[:, None]
    split = split_variance(cases(rewards.tolist()), greedy=False)
    of_question, of_order = rewards.mean((1, 2)), rewards.mean(2)
    mean_squares = {
        "question": 12 * ((of_question - rewards.mean()) ** 2).sum() / 6,
        "order": 4 * ((of_order - of_question[:, None]) ** 2).sum() / 14,
        "sampling": ((rewards - of_order[:, :, None]) ** 2).sum() / 63,
    }
    assert split.sampling_variance == pytest.approx(mean_squares["sampling"])
    assert split.order_variance == pytest.approx((mean_squares["order"] - mean_squares["sampling"]) / 4)
    assert split.question_variance == pytest.approx((mean_squares["question"] - mean_squares["order"]) / 12)


def test_greedy_answers_have_no_sampling_variance():
    split = split_variance(cases([[[1], [0]], [[1], [1]], [[0], [0]]]), greedy=True)
    assert split.sampling_variance == 0
    assert split.order_variance == 0.5 / 3  # mean square between orders
    assert split.sampling_squares == 0


def test_one_sampled_rollout_cannot_tell_order_from_sampling():
    split = split_variance(cases([[[1], [0]], [[1], [1]]]), greedy=False)
    assert split.order_variance is None
    assert split.sampling_variance is None
    assert split.order_squares == 0.5


def test_one_order_has_no_order_variance():
    split = split_variance(cases([[[1, 0]], [[1, 1]]]), greedy=False)
    assert split.order_variance is None
    assert split.sampling_variance == 0.25


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=6
    )
)
def test_sums_of_squares_add_up(table):
    split = split_variance(cases(table), greedy=False)
    parts = split.question_squares + split.order_squares + split.sampling_squares
    assert parts == pytest.approx(split.total_squares, abs=1e-9)
    freedom = split.question_freedom + split.order_freedom + split.sampling_freedom
    assert freedom == split.num_rewards - 1


@pytest.mark.parametrize("balanced", [True, False])
def test_estimates_are_unbiased(balanced):
    """Known components, 150 simulated evaluations: the mean estimate is within 4 of its standard errors."""
    random = np.random.default_rng(3)
    truth = {"question_variance": 0.5, "order_variance": 0.2, "sampling_variance": 0.8}
    estimates = {name: [] for name in truth}
    for _ in range(150):
        table = []
        for _ in range(12):
            question = random.normal(0, truth["question_variance"] ** 0.5)
            orders = 4 if balanced else int(random.integers(1, 6))
            table.append([])
            for _ in range(orders):
                mean = question + random.normal(0, truth["order_variance"] ** 0.5)
                rollouts = 3 if balanced else int(random.integers(1, 5))
                table[-1].append(random.normal(mean, truth["sampling_variance"] ** 0.5, rollouts).tolist())
        split = split_variance(cases(table), greedy=False)
        for name, values in estimates.items():
            values.append(getattr(split, name))
    for name, values in estimates.items():
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - truth[name]) < 4 * error, name
