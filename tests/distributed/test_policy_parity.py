"""The policy against transformers, in every layout: log-probabilities, every gradient, and the weights' round trip."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_worker import LAYOUTS, check_layout, relative_error
from tiny_policy import hf_model, make_batch, reference

from perl_megatron.config.schema import ParallelConfig

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints and what transformers computes with them, in float32 and float64."""
    folder = tmp_path_factory.mktemp("parity")
    for name in ("untied", "tied"):
        hf_model(tied=name == "tied").save_pretrained(folder / name)
        single = reference(folder / name, make_batch(), torch.float32)
        double = reference(folder / name, make_batch(), torch.float64)
        content = {
            "log_probs_32": single.log_probs,
            "log_probs_64": double.log_probs,
            "gradients_32": single.gradients,
            "gradients_64": double.gradients,
        }
        torch.save(content, folder / f"{name}.reference.pt")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """One launch for all layouts: it costs ten seconds of imports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    log = folder / "workers.log"
    with log.open("w") as output:
        launch = subprocess.Popen(
            [*command, str(TESTS / "distributed" / "parity_worker.py"), str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = launch.wait(timeout=500)
        finally:
            if launch.poll() is None:
                os.killpg(launch.pid, signal.SIGKILL)  # torchrun's workers too
    assert returncode == 0, log.read_text()[-4000:]
    return json.loads((folder / "result.json").read_text())


def assert_parity(result, folder, name):
    content = torch.load(folder / f"{name}.reference.pt", weights_only=True)
    assert result["log_prob"] <= 1e-5
    own_error = max(
        (single - double).abs().max().item()
        for single, double in zip(content["log_probs_32"], content["log_probs_64"], strict=True)
    )
    assert result["log_prob_64"] <= 3 * own_error
    assert result["gradient"].keys() == content["gradients_64"].keys()
    # The yardstick is what transformers loses in float32 against float64; no gradient is zero, so nothing is vacuous.
    for parameter, error in result["gradient"].items():
        true = content["gradients_64"][parameter]
        assert true.norm() > 0
        assert error <= 4 * relative_error(content["gradients_32"][parameter], true), parameter
    assert result["round_trip"]
    assert result["num_tensors"] == len(content["gradients_64"])


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_one_process(folder, name):
    assert_parity(check_layout(folder, name, ParallelConfig()), folder, name)


@pytest.mark.parametrize("label", LAYOUTS)
def test_two_ranks(folder, results, label):
    assert_parity(results[label], folder, LAYOUTS[label][0])


def test_log_prob_kernel_over_two_ranks(results):
    assert results["log_prob kernel"]["value"] <= 1e-13
    assert results["log_prob kernel"]["gradient"] <= 1e-13
