"""What a process keeps of a layout that it has left."""

import os
import subprocess
import sys

import pytest

from perl_megatron.launch.failures import DIRECTORY_VARIABLE, first_failure

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


LEAVING = """
import sys, time
from perl_megatron.runtime import platform

platform.install()
import torch.distributed as dist
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.runtime import topology

topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
leave = dist.destroy_process_group

def never_ends(group=None):
    time.sleep(1000)

topology.SHUTDOWN_SECONDS = 1.0
with topology.left_at_the_end():
    if sys.argv[1] == "stuck":
        dist.destroy_process_group = never_ends
    raise ArithmeticError("the cause")
"""


@pytest.mark.parametrize("how", ["stuck", "free"])
def test_what_ended_a_rank_is_told_although_it_cannot_leave_the_others(how, tmp_path):
    """As NCCL's process groups may not be left where another rank is stuck."""
    environment = {**os.environ, DIRECTORY_VARIABLE: str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", LEAVING, how]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    failure = first_failure(tmp_path)
    assert failure is not None
    assert "ArithmeticError: the cause" in failure.text
    assert ("in never_ends" in result.stderr) is (how == "stuck")
