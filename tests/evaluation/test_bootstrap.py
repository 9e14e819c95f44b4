"""Bootstrap intervals against the normal approximation, their coverage by simulation, clusters, exact bounds."""

import numpy as np
import pytest

from perl_megatron.evaluation.bootstrap import Answer, bootstrap, paired_difference


def answers(values, task="t", clusters=None):
    clusters = clusters if clusters is not None else [f"{task}{index}" for index in range(len(values))]
    return [Answer(task, str(cluster), float(value)) for cluster, value in zip(clusters, values, strict=True)]


def test_values_are_the_plain_means():
    table = bootstrap([*answers([1, 0, 0, 0], "a"), *answers([1, 1], "b")], seed=0)
    assert table.by_task["a"].value == 0.25
    assert table.by_task["b"].value == 1.0
    assert table.micro.value == 0.5
    assert table.macro.value == 0.625


def test_width_is_that_of_the_normal_approximation():
    values = [1] * 300 + [0] * 700
    micro = bootstrap(answers(values), seed=1, num_resamples=20_000).micro
    half = 1.959964 * np.sqrt(0.3 * 0.7 / 1000)
    assert micro.low == pytest.approx(0.3 - half, abs=0.002)
    assert micro.high == pytest.approx(0.3 + half, abs=0.002)


def test_macro_width_weighs_tasks_equally():
    small, large = [1] * 20 + [0] * 20, [1] * 500 + [0] * 500
    macro = bootstrap([*answers(small, "small"), *answers(large, "large")], seed=2, num_resamples=20_000).macro
    half = 1.959964 * np.sqrt(0.25 / 40 + 0.25 / 1000) / 2
    assert macro.high - macro.value == pytest.approx(half, rel=0.06)


def test_clusters_widen_the_interval():
    """Each question four times with the same outcome: a quarter of the independent answers, twice the width."""
    outcome = np.random.default_rng(0).integers(0, 2, 100)
    repeated = np.repeat(outcome, 4)
    alone = bootstrap(answers(repeated), seed=3).micro
    together = bootstrap(answers(repeated, clusters=np.repeat(np.arange(100), 4)), seed=3).micro
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.1)


def test_versions_of_a_question_are_drawn_together():
    """Five versions with one outcome a question: macro varies as one version does, not as five independent ones."""
    outcome = np.random.default_rng(1).integers(0, 2, 200)
    rows = [row for version in "abcde" for row in answers(outcome, version, clusters=range(200))]
    table = bootstrap(rows, seed=4)
    width, one = table.macro.high - table.macro.low, table.by_task["a"].high - table.by_task["a"].low
    assert width == pytest.approx(one)


def test_coverage():
    """About 95 % of the intervals hold the true accuracy."""
    random, held = np.random.default_rng(5), 0
    for trial in range(300):
        interval = bootstrap(answers(random.random(80) < 0.6), seed=trial, num_resamples=400).micro
        held += interval.low <= 0.6 <= interval.high
    assert 0.90 <= held / 300 <= 0.985


@pytest.mark.parametrize("value", [0, 1])
def test_all_alike_is_not_certain(value):
    """The exact binomial bound: 0.025^(1/n)."""
    micro = bootstrap(answers([value] * 30), seed=0).micro
    bound = 0.025 ** (1 / 30)
    assert (micro.low, micro.high) == pytest.approx((bound, 1) if value else (0, 1 - bound))


def test_the_same_seed_gives_the_same_interval():
    rows = answers(np.random.default_rng(0).random(50))
    assert bootstrap(rows, seed=7) == bootstrap(rows, seed=7)
    assert bootstrap(rows, seed=7).micro != bootstrap(rows, seed=8).micro


def test_batches_of_weights_do_not_matter(monkeypatch):
    rows = answers(np.random.default_rng(0).integers(0, 2, 50))
    whole = bootstrap(rows, seed=7)
    monkeypatch.setattr("perl_megatron.evaluation.bootstrap.MAX_WEIGHTS", 170)
    assert bootstrap(rows, seed=7) == whole


def test_paired_difference_is_narrower_than_two_intervals():
    random = np.random.default_rng(0)
    first = (random.random(400) < 0.5).astype(int)
    second = first.copy()
    second[:20] = 1  # the same answers but for a few
    difference = paired_difference(answers(first), answers(second), seed=0)["micro"]
    assert difference.value == pytest.approx((second.sum() - first.sum()) / 400)
    half = 1.96 * np.std(second - first) / 20
    assert difference.high - difference.value == pytest.approx(half, rel=0.2)
    assert difference.low >= 0
