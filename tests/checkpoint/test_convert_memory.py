"""A conversion's memory does not grow with the model: bounded by the largest parameter and the read-ahead buffer."""

import json
import os
import subprocess
import sys
from pathlib import Path

from random_checkpoint import SMALL, tool

BUFFER = 4 << 20

PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
from perl_megatron.checkpoint.convert import plan_conversion

torch.set_num_threads(1)
folder = Path(sys.argv[1])
STEPS = [
    ("weights", "one", "torch_dist", 1),
    ("one", "back from one", "hf", 1),
    ("weights", "two", "torch_dist", 2),
    ("two", "back from two", "hf", 1),
]

def memory(key):
    return int(re.search(key + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def convert(folder, source, target, to, tensor_size):
    limits = {"max_file_bytes": 8 << 20, "read_ahead_bytes": 4 << 20}
    plan_conversion(folder / source, folder / target, to=to, tensor_size=tensor_size, **limits).run()

for step in STEPS:
    convert(folder / "1", *step)  # loads code and starts threads
grown = {}
for step in STEPS:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    resident = memory("VmRSS")
    convert(folder / "12", *step)
    grown[step[1]] = memory("VmHWM") - resident
print(json.dumps(grown))
"""


def make(folder: Path, layers: int) -> None:
    """Many equal layers: a matrix of the language model has at most 3 MiB, the embedding 1.5 MiB."""
    config = json.loads((SMALL / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "intermediate_size": 2048, "hidden_size": 768, "vocab_size": 1001}
    config["num_attention_heads"], config["num_key_value_heads"] = 24, 8
    config["vision_config"]["out_hidden_size"] = 768
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tool("make_random_weights").make_random_weights(folder / "weights", folder)


def test_memory_holds_a_parameter_and_a_buffer_in_every_direction(tmp_path):
    for layers in (1, 12):
        make(tmp_path / str(layers), layers)
    # Freed memory goes back to the system at once, so that what is measured is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROGRAM, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    largest = 2 * 2048 * 768 * 2  # gate and up together
    # The buffer, one tensor beyond its end, the parameter in work and a copy of it, and half a one for the interpreter.
    bound = BUFFER + 3.5 * largest
    assert sum(file.stat().st_size for file in (tmp_path / "12" / "weights").iterdir()) > 4 * bound
    grown = json.loads(run.stdout)
    assert len(grown) == 4
    assert all(0 < num_bytes < bound for num_bytes in grown.values()), grown
