"""Converted checkpoints in two processes: megatron-core loads them, whatever layout they were cut for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conversion_worker import CONVERTED, LAYOUTS
from tiny_policy import hf_model

from perl_megatron.checkpoint.convert import plan_conversion

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion")
    for name in ("untied", "tied"):
        hf_model(tied=name == "tied").save_pretrained(folder / name)
        for layout in CONVERTED:
            tensor_size, pipeline_size = map(int, layout.split("x"))
            plan_conversion(
                folder / name,
                folder / f"{name}-{layout}",
                to="torch_dist",
                tensor_size=tensor_size,
                pipeline_size=pipeline_size,
                max_file_bytes=400_000,
            ).run()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    log = folder / "workers.log"
    with log.open("w") as output:
        launch = subprocess.Popen(
            [*command, str(TESTS / "distributed" / "conversion_worker.py"), str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = launch.wait(timeout=300)
        finally:
            if launch.poll() is None:
                os.killpg(launch.pid, signal.SIGKILL)  # torchrun's workers too
    assert returncode == 0, log.read_text()[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("label", LAYOUTS)
def test_loads_and_reads_back_bit_for_bit(results, label):
    assert results[label] == dict.fromkeys([*(f"loads {layout}" for layout in CONVERTED), "read back"], True)
