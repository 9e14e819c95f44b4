"""Two ranks in every layout against transformers in float64, in one torchrun launch."""

import numpy as np
import pytest
from actor_case import make_config, make_encoder
from actor_results import run_worker
from actor_worker import LAYOUTS, RESHARDED, RESUMED, TIED, folder_of, train

from perl_megatron.config.schema import ParallelConfig
from perl_megatron.runtime import topology
from perl_megatron.train.actor import Actor


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def results(cases, out):
    return run_worker(cases, out, "layouts")


@pytest.fixture(scope="module")
def expected(cases, results, expected_of):
    folders = {folder_of(cases, name) for name in ("tensor", *TIED)}
    return {case: expected_of(case) for case in folders}


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probabilities_loss_and_gradient(cases, results, expected, name):
    found, want = results[name], expected[folder_of(cases, name)]
    want.check_log_probs(found.arrays["log_probs"])
    assert np.array_equal(found.arrays["log_probs"], found.arrays["reference"])
    want.check_loss(found.report["metrics"]["loss"])
    want.check_step(found.steps, found.report["metrics"]["gradient_norm"])
    assert found.report["ranks_agree"]


@pytest.mark.parametrize("name", RESUMED)
def test_continuing_from_a_checkpoint_is_bit_for_bit_the_uninterrupted_run(results, name):
    report = results[name].report
    assert report["extra"] == {"note": "after two"}
    assert report["same_metrics"]
    assert report["same_weights"]
    assert report["same_files"], "a kept plan writes something else than a new one"


def test_a_checkpoint_is_continued_in_another_layout(results, cases, out):
    expected = results[RESUMED[0]].report["metrics_of_rest"]
    for name in RESHARDED:
        for actual, metrics in zip(results[name].report["metrics_of_rest"], expected, strict=True):
            assert actual == pytest.approx(metrics, rel=1e-4)
    case = folder_of(cases, RESUMED[0])
    one = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    try:
        encoder = make_encoder(case)
        for name in RESUMED:
            actor = Actor(make_config(case), one, encoder, total_steps=10)
            actor.restore(out / "checkpoints" / name / "step-00000002")
            for actual, metrics in zip(train(actor, case, encoder, [2, 3]), expected, strict=True):
                assert actual == pytest.approx(metrics, rel=1e-4)
    finally:
        topology.shutdown()
