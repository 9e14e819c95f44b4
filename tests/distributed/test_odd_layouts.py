"""Micro-batches without images, with one, with 32, and with very different ones, on two ranks: right, and no hang."""

from functools import partial

import pytest
from actor_results import pace_of, run_worker
from actor_worker import FILLER, ODD_LAYOUTS, folder_of, sequences_of
from actor_yardstick import expect


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory):
    return run_worker(cases, tmp_path_factory.mktemp("results"), "odd")


@pytest.fixture(scope="module")
def expected(cases, results):
    """By whether the layout is a filler's."""
    return {name in FILLER: expect(folder_of(cases, name), partial(sequences_of, name)) for name in ("data_1", *FILLER)}


@pytest.mark.parametrize("name", ODD_LAYOUTS)
def test_log_probabilities_loss_and_gradient(results, expected, name):
    """Among them micro-batches without images, and a data rank without sequences."""
    found, want = results[name], expected[name in FILLER]
    want.check_log_probs(found.arrays["log_probs"])
    want.check_loss(found.report["metrics"]["loss"])
    want.check_step(found.steps, found.report["metrics"]["gradient_norm"], partial(pace_of, ODD_LAYOUTS[name]))
    assert found.report["ranks_agree"]
