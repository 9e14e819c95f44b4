"""Two ranks in every layout against transformers in float64, in one torchrun launch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from actor_case import (
    Reference,
    gradient,
    make_case,
    make_config,
    make_encoder,
    make_sequences,
    with_log_probs,
    worst_relative_error,
)
from actor_worker import LAYOUTS, RESHARDED, RESUMED, TIED, folder_of, train

from perl_megatron.config.schema import ParallelConfig
from perl_megatron.runtime import topology
from perl_megatron.train.actor import Actor

WORKER = Path(__file__).with_name("actor_worker.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    make_case(folder / "untied", layers=4)
    make_case(folder / "tied", layers=4, tie=True)
    return folder


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory):
    """{layout: (arrays, report)} of the two ranks."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(WORKER), str(cases), str(out), "layouts"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-5000:]
    return out, {
        name: (dict(np.load(out / f"{name}.npz")), json.loads((out / f"{name}.json").read_text())) for name in LAYOUTS
    }


@pytest.fixture(scope="module")
def expected(cases, results):
    """{case folder: float64 log-probabilities, loss and gradient of the update that the worker made}."""
    return {folder_of(cases, name): reference_values(folder_of(cases, name)) for name in ("tensor", *TIED)}


def reference_values(case):
    encoder = make_encoder(case)
    reference = Reference(case, encoder)
    sequences = make_sequences(case, encoder)
    log_probs = [reference.log_prob(sequence).detach().numpy() for sequence in sequences]
    loss = reference.policy_loss(with_log_probs(sequences, log_probs, log_probs, noise=0.5), make_config(case))
    loss.backward()
    return np.concatenate(log_probs), loss.item(), {name: p.grad.numpy() for name, p in reference.named()}


def of_weights(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probabilities_loss_and_gradient(cases, results, expected, name):
    arrays, report = results[1][name]
    log_probs, loss, gradients = expected[folder_of(cases, name)]
    np.testing.assert_allclose(arrays["log_probs"], log_probs, rtol=0, atol=1e-5)
    assert np.array_equal(arrays["log_probs"], arrays["reference"])
    assert report["metrics"]["loss"] == pytest.approx(loss, rel=1e-4)
    found = gradient(of_weights(arrays, "before/"), of_weights(arrays, "after/"))
    assert worst_relative_error(found, gradients) < 2e-5
    norm = np.sqrt(sum((value**2).sum() for value in gradients.values()))
    assert report["metrics"]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert report["ranks_agree"]


@pytest.mark.parametrize("name", RESUMED)
def test_continuing_from_a_checkpoint_is_bit_for_bit_the_uninterrupted_run(results, name):
    report = results[1][name][1]
    assert report["extra"] == {"note": "after two"}
    assert report["same_metrics"]
    assert report["same_weights"]


def test_a_checkpoint_is_continued_in_another_layout(results, cases):
    out, found = results
    expected = found[RESUMED[0]][1]["metrics_of_rest"]
    for actual, metrics in zip(found[RESHARDED][1]["metrics_of_rest"], expected, strict=True):
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
