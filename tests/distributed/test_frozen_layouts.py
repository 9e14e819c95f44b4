"""Frozen parts and parts with their own rate on two ranks against transformers in float64."""

from functools import partial

import pytest
from actor_case import make_config, make_encoder
from actor_results import pace_of, run_worker
from actor_worker import FROZEN_LAYOUTS, RESUMED_FROZEN, TIED, folder_of, train

from perl_megatron.config.schema import ParallelConfig
from perl_megatron.runtime import topology
from perl_megatron.train.actor import Actor


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def results(cases, out):
    return run_worker(cases, out, "frozen")


@pytest.fixture(scope="module")
def expected(cases, results, expected_of):
    folders = [folder_of(cases, name) for name in ("untied", *TIED)]
    return {case: expected_of(case) for case in set(folders)}


@pytest.mark.parametrize("name", FROZEN_LAYOUTS)
def test_frozen_parts_stay_and_the_others_take_their_multiple_of_the_step(cases, results, expected, name):
    found, pace = results[name], partial(pace_of, FROZEN_LAYOUTS[name])
    assert {bool(pace(tensor)) for tensor in found.steps} == {False, True}
    expected[folder_of(cases, name)].check_step(found.steps, found.report["metrics"]["gradient_norm"], pace)
    assert found.report["ranks_agree"]


@pytest.mark.parametrize("name", FROZEN_LAYOUTS)
def test_log_probabilities_and_loss_are_the_whole_policys(cases, results, expected, name):
    found, want = results[name], expected[folder_of(cases, name)]
    want.check_log_probs(found.arrays["log_probs"])
    want.check_loss(found.report["metrics"]["loss"])


@pytest.mark.parametrize("name", RESUMED_FROZEN)
def test_continuing_from_a_checkpoint_is_bit_for_bit_the_uninterrupted_run(results, name):
    assert results[name].report["same_metrics"]
    assert results[name].report["same_weights"]
    assert results[name].report["same_files"], "a kept plan writes something else than a new one"


def test_a_checkpoint_with_frozen_parts_is_continued_in_one_process(results, cases, out):
    case = folder_of(cases, RESUMED_FROZEN[0])
    one = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    try:
        encoder = make_encoder(case)
        for name in RESUMED_FROZEN:
            config = make_config(case, optimizer=FROZEN_LAYOUTS[name]["optimizer"])
            actor = Actor(config, one, encoder, total_steps=10)
            actor.restore(out / "checkpoints" / name / "step-00000002")
            uninterrupted = results[name].report["metrics_of_rest"]
            for actual, metrics in zip(train(actor, case, encoder, [2, 3]), uninterrupted, strict=True):
                assert actual == pytest.approx(metrics, rel=1e-4)
    finally:
        topology.shutdown()
