"""What a process keeps of a layout that it has left."""

import subprocess
import sys

PROGRAM = """
from perl_megatron.runtime import platform

platform.install()
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.runtime import topology

def num_threads():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

counts = []
for _ in range(4):
    topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    topology.forget_layout()
    counts.append(num_threads())
topology.shutdown()
print(*counts)
"""


def test_a_layout_that_is_left_keeps_no_threads():
    # On gloo a process group has threads of its own; a process that goes through many layouts would drown in them.
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, *later = map(int, result.stdout.split())
    assert max(later) <= first + 4, result.stdout
