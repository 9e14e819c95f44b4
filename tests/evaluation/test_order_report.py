"""The order-bias report: rows by hand, a policy with a planted slot bias, the files that it writes."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from perl_megatron.data.permutation import apply_order
from perl_megatron.evaluation.order_bias import ViewOutcome, flips, order_bias
from perl_megatron.evaluation.order_report import OrderRow, SlotRow, order_report
from perl_megatron.evaluation.slots import answered_slot, expected_slot, queried_slot
from perl_megatron.observability.order_bias_plot import plot_order_bias
from perl_megatron.reward.grade import answers, question_of
from perl_megatron.types import AnswerRule, Grading, PermutationContract, Record, ReferenceRule

ORDERS = list(permutations(range(3)))


def outcome(record, order, correct, *, slot=None, answered=None, rollout=0, kind="find"):
    return ViewOutcome(record, kind, order, correct, slot, rollout, float(correct), answered)


TABLE = [
    outcome("a", (0, 1), True, slot=0, answered=0),
    outcome("a", (1, 0), False, slot=1, answered=0),
    outcome("b", (0, 1), False, slot=1, answered=0),
    outcome("b", (1, 0), True, slot=0, answered=0),
    outcome("c", (0, 1, 2), True, kind="sum"),
    outcome("c", (2, 1, 0), True, kind="sum"),
]


def test_by_hand():
    report = order_report(TABLE, greedy=True, seed=0)
    assert report.accuracy.value == pytest.approx(4 / 6)
    assert report.flip_rate.value == pytest.approx(2 / 3)
    assert report.by_order == (
        OrderRow(2, (0, 1), 2, 0.5),
        OrderRow(2, (1, 0), 2, 0.5),
        OrderRow(3, (0, 1, 2), 1, 1.0),
        OrderRow(3, (2, 1, 0), 1, 1.0),
    )
    assert report.slots == (SlotRow(2, 0, 2, 1.0, 0.5, 1.0), SlotRow(2, 1, 2, 0.0, 0.5, 0.0))
    assert report.worst_slots()[0].slot == 1
    assert report.variance.order_squares == 1.0  # 2 questions, 0.5² for each of 2 views
    assert report.variance.question_squares == pytest.approx(2 * 2 * (1 / 6) ** 2 + 2 * (1 / 3) ** 2)


def test_several_rollouts_flip_by_majority():
    rows = [
        *(outcome("a", (0, 1), right, rollout=number) for number, right in enumerate((True, True, False))),
        *(outcome("a", (1, 0), right, rollout=number) for number, right in enumerate((True, False, False))),
        *(outcome("b", (0, 1), right, rollout=number) for number, right in enumerate((True, True, False))),
        *(outcome("b", (1, 0), right, rollout=number) for number, right in enumerate((False, True, True))),
    ]
    assert flips(rows) == {"a": True, "b": False}
    rates = order_bias(rows).overall
    assert (rates.num_views, rates.num_records, rates.flip_rate) == (4, 2, 0.5)
    assert rates.accuracy == 7 / 12


def test_half_is_no_majority():
    rows = [
        *(outcome("a", (0, 1), right, rollout=number) for number, right in enumerate((True, False))),
        *(outcome("a", (1, 0), right, rollout=number) for number, right in enumerate((False, False))),
    ]
    assert flips(rows) == {"a": False}


def test_no_second_order_has_no_flip_rate():
    report = order_report([outcome("a", (0, 1), True), outcome("b", (0, 1), False)], greedy=True, seed=0)
    assert report.flip_rate is None
    assert report.variance.order_variance is None
    assert report.slots == ()


def biased_policy(strength, *, num_questions, num_rollouts, seed):
    """Names slot 0 with probability ``strength``, else the right slot of three."""
    random = np.random.default_rng(seed)
    rows = []
    for question in range(num_questions):
        image = int(random.integers(3))
        for order in ORDERS:
            slot = order.index(image)
            for rollout in range(num_rollouts):
                answered = 0 if random.random() < strength else slot
                row = outcome(str(question), order, answered == slot, slot=slot, answered=answered, rollout=rollout)
                rows.append(row)
    return rows


def test_a_planted_slot_bias_is_found():
    """With probability p the answer is slot 0: accuracy 1 in slot 0 and 1 - p elsewhere; variances follow from it.

    A right answer has the probability 1 in a third of the orders and 1 - p in the others, for every question: between
    orders 2/9·p², within an order 2/3·p(1 - p), between questions 0.
    """
    strength, estimates = 0.4, []
    for seed in range(40):
        report = order_report(
            biased_policy(strength, num_questions=40, num_rollouts=3, seed=seed), greedy=False, seed=0
        )
        split = report.variance
        estimates.append((split.question_variance, split.order_variance, split.sampling_variance))
    # Orders are a question's own draws without replacement from 6: the variance of a draw is 6/5 of the population's.
    expected = np.array([-2 / 9 * strength**2 / 5, 2 / 9 * strength**2 * 6 / 5, 2 / 3 * strength * (1 - strength)])
    error = np.std(estimates, axis=0) / len(estimates) ** 0.5
    assert np.all(np.abs(np.mean(estimates, axis=0) - expected) < 4 * error)
    first, second, third = report.slots
    assert first.accuracy == 1.0
    assert second.accuracy == pytest.approx(0.6, abs=0.08)
    assert first.answered_share - first.expected_share == pytest.approx(strength * 2 / 3, abs=0.08)
    assert third.answered_share < third.expected_share
    assert {row.slot for row in report.worst_slots()[:2]} == {1, 2}


def test_files(tmp_path):
    report = order_report(TABLE, greedy=True, seed=0)
    report.write(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["by_order"][0] == {"num_images": 2, "order": [0, 1], "num_answers": 2, "accuracy": 0.5}
    assert content["variance"]["total_squares"] == pytest.approx(
        sum(content["variance"][f"{part}_squares"] for part in ("question", "order", "sampling"))
    )
    plot_order_bias(content, tmp_path / "r.png", title="test")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    plot_order_bias(order_report(TABLE[4:], greedy=True, seed=0).to_dict(), tmp_path / "s.png", title="no slots")
    assert report.render().renderables


def record(contract, answer, text="<image><image><image> Which?"):
    images = tuple(Path(str(number)) for number in range(3))
    return Record(id="r", images=images, text=text, answer=answer, contract=contract)


@pytest.mark.parametrize("order", ORDERS)
def test_slots_follow_the_images(order):
    """Image 1 (from 0) is the answer, or asked about; it stands where the order puts it."""
    place = order.index(1)
    letters = PermutationContract((0, 1, 2), answer=AnswerRule.OPTION_LETTER, option_slots=(0, 1, 2))
    view = apply_order(record(letters, "B"), order, 0)
    assert expected_slot(view, letters) == place
    assert answered_slot(f"\\boxed{{{'ABC'[place]}}}", view, letters) == place
    index = PermutationContract((0, 1, 2), answer=AnswerRule.INDEX)
    view = apply_order(record(index, "2"), order, 0)
    assert expected_slot(view, index) == place
    assert answered_slot("\\boxed{image 3}", view, index) == 2
    asked = PermutationContract((0, 1, 2), references=(ReferenceRule.INDEX,))
    view = apply_order(record(asked, "7", "<image><image><image> Which digit is in image 2?"), order, 0)
    assert expected_slot(view, asked) is None
    assert queried_slot(view, asked) == place


@pytest.mark.parametrize("response", ["\\boxed{D}", "\\boxed{A or B}", "A", "\\boxed{}", "\\boxed{E}"])
def test_answers_that_name_no_slot(response):
    contract = PermutationContract((0, 1, 2), answer=AnswerRule.OPTION_LETTER, option_slots=(0, 1, 2, None))
    view = apply_order(record(contract, "B"), (0, 1, 2), 0)
    assert answered_slot(response, view, contract) is None


@pytest.mark.parametrize("response", ["\\boxed{0}", "\\boxed{4}", "\\boxed{1.5}", "\\boxed{-1}", "\\boxed{x}"])
def test_numbers_that_name_no_slot(response):
    contract = PermutationContract((0, 1, 2), answer=AnswerRule.INDEX)
    view = apply_order(record(contract, "2"), (0, 1, 2), 0)
    assert answered_slot(response, view, contract) is None


@pytest.mark.parametrize("answer", ["C", "(C) image 3", "blue cup", "C. blue cup", "the third image", "the last image"])
def test_an_option_is_read_as_grading_reads_it(answer):
    """The first option is image 2, so that its text, its letter and its image's number differ."""
    contract = PermutationContract((0, 1, 2), answer=AnswerRule.OPTION_LETTER, option_slots=(1, 0, 2))
    asked = replace(record(contract, "C"), answer_type="choice", grading=Grading(("red ball", "hat", "blue cup")))
    view = apply_order(asked, (0, 1, 2), 0)
    assert answers(answer, question_of(view))
    assert answered_slot(f"\\boxed{{{answer}}}", view, contract) == 2


def test_the_last_image_is_an_index():
    contract = PermutationContract((0, 1, 2), answer=AnswerRule.INDEX)
    assert answered_slot("\\boxed{the last image}", apply_order(record(contract, "2"), (0, 1, 2), 0), contract) == 2


@pytest.mark.parametrize("order", ORDERS)
def test_an_answer_that_refers_to_an_image_has_its_slot(order):
    contract = PermutationContract((0, 1, 2), (ReferenceRule.ORDINAL,), AnswerRule.REFERENCES)
    view = apply_order(record(contract, "the second image"), order, 0)
    assert expected_slot(view, contract) == order.index(1)
    assert answered_slot("\\boxed{The third image}", view, contract) == 2
    assert answered_slot("\\boxed{a dog}", view, contract) is None


def test_several_references_name_no_slot():
    contract = PermutationContract((0, 1, 2), references=(ReferenceRule.INDEX,))
    text = "<image><image><image> Are image 1 and image 2 alike?"
    assert queried_slot(apply_order(record(contract, "7", text), (0, 1, 2), 0), contract) is None
