"""Micro-batches without images, with one, with 32, and with very different ones, on two ranks: right, and no hang."""

from functools import partial

import numpy as np
import pytest
from actor_case import norm, worst_relative_error
from actor_results import expect, run_worker
from actor_worker import FILLER, ODD_LAYOUTS, folder_of, sequences_of


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory):
    return run_worker(cases, tmp_path_factory.mktemp("results"), "odd")


@pytest.fixture(scope="module")
def expected(cases, results):
    """By whether the layout is a filler's."""
    return {name in FILLER: expect(folder_of(cases, name), partial(sequences_of, name)) for name in ("data_1", *FILLER)}


@pytest.mark.parametrize("name", ODD_LAYOUTS)
def test_log_probabilities_loss_and_gradient(results, expected, name):
    """Among them a data rank whose whole share has no images, or no sequences at all."""
    found, want = results[name], expected[name in FILLER]
    np.testing.assert_allclose(found.arrays["log_probs"], want.log_probs, rtol=0, atol=1e-5)
    assert found.report["metrics"]["loss"] == pytest.approx(want.loss, rel=1e-4)
    assert found.report["metrics"]["gradient_norm"] == pytest.approx(norm(want.gradients), rel=1e-5)
    assert worst_relative_error(found.steps, want.gradients) < 2e-5
    assert found.report["ranks_agree"]
