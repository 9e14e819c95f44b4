"""Converted checkpoints in two processes: megatron-core loads them, whatever layout they were cut for."""

import json
from pathlib import Path

import pytest
from conversion_worker import CONVERTED, LAYOUTS
from launch_ranks import launch_ranks
from tiny_policy import hf_model

from perl_megatron.checkpoint.convert import plan_conversion

WORKER = Path(__file__).with_name("conversion_worker.py")


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
    launch_ranks(WORKER, folder, log=folder / "ranks.log", timeout=300)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("label", LAYOUTS)
def test_loads_and_reads_back_bit_for_bit(results, label):
    assert results[label] == dict.fromkeys([*(f"loads {layout}" for layout in CONVERTED), "read back"], True)
