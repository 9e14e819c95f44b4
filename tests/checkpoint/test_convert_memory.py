"""A conversion's memory does not grow with the model: bounded by the largest parameter and the read-ahead buffer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_checkpoint import SMALL, tool

MIB = 2**20
BUFFER = 4 * MIB

PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
from perl_megatron.checkpoint.convert import plan_conversion

torch.set_num_threads(1)
small, source, target, to, tensor_size = *map(Path, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])

def memory(key):
    return int(re.search(key + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def convert(source, target):
    plan_conversion(
        source, target, to=to, tensor_size=tensor_size, max_file_bytes=8 << 20, read_ahead_bytes=4 << 20
    ).run()

convert(small, target.with_name("warm"))  # loads code and starts threads
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
resident = memory("VmRSS")
convert(source, target)
print(memory("VmHWM") - resident)
"""


def make(folder: Path, layers: int) -> Path:
    """Many equal layers: a matrix of the language model has at most 3 MiB, the embedding 1.5 MiB."""
    config = json.loads((SMALL / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "intermediate_size": 2048, "hidden_size": 768, "vocab_size": 1001}
    config["num_attention_heads"], config["num_key_value_heads"] = 24, 8
    config["vision_config"]["out_hidden_size"] = 768
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tool("make_random_weights").make_random_weights(folder / "weights", folder)
    return folder / "weights"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    return {layers: make(folder / str(layers), layers) for layers in (1, 12)}


def grown(source: Path, warm: Path, target: Path, to: str, tensor_size: int = 1) -> int:
    """Bytes of the peak above what the process held before."""
    target.parent.mkdir(exist_ok=True)
    arguments = [warm, source, target, to, str(tensor_size)]
    # Freed memory goes back to the system at once, so that what is measured is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_memory_holds_a_parameter_and_a_buffer_in_every_direction(sources, tmp_path):
    size = sum(file.stat().st_size for file in sources[12].glob("*.safetensors"))
    largest = 2 * 2048 * 768 * 2  # gate and up together
    # The buffer, one tensor beyond its end, the parameter in work and a copy of it, and half a one for the interpreter.
    bound = BUFFER + 3.5 * largest
    assert size > 4 * bound
    warm = sources[1]
    for name, tensor_size in (("one", 1), ("two", 2)):
        assert 0 < grown(sources[12], warm, tmp_path / name / "a", "torch_dist", tensor_size) < bound
        assert 0 < grown(tmp_path / name / "a", tmp_path / name / "warm", tmp_path / "hf" / name, "hf") < bound
        (tmp_path / "hf" / "warm").rename(tmp_path / "hf" / f"warm of {name}")
