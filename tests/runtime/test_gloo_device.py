"""Process groups of gloo share a device; the test that counts fails once torch shares it by itself: then ours goes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA"),
    pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc"),
]

PROGRAM = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
if "shared" in sys.argv:
    from perl_megatron.runtime import gloo_device
    gloo_device.install()

def loops():
    time.sleep(0.5)  # until a new thread has given itself its name
    names = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("gloo_tcp_loop") for name in names)

def total():
    value = torch.ones(3)
    dist.all_reduce(value)
    return value.sum().item()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=70))
group = dist.new_group(timeout=timedelta(seconds=50))
options = [each._get_backend(torch.device("cpu")).options for each in (dist.group.WORLD, group)]
assert [each._timeout.total_seconds() for each in options] == [70, 50], options
for _ in range(3):
    dist.new_group()
dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timeout=timedelta(seconds=9))
dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=9))
print(loops(), total())
own = dist.ProcessGroupGloo._Options()
own._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
before = loops()
dist.ProcessGroupGloo(dist.HashStore(), 0, 1, own)
assert loops() == before, "what a caller chooses is taken"
dist.destroy_process_group()
sys.stdout.flush()
if os.fork() == 0:
    # A fork has none of its parent's threads, so its groups need a device of their own.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(loops(), total(), flush=True)
    os._exit(0)
os.wait()
"""


def output(*arguments: str, **environment: str) -> list[list[float]]:
    """(loops, total) of the process and of its fork."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [[float(word) for word in line.split()] for line in run.stdout.splitlines()]


def test_torch_makes_a_device_for_each_group() -> None:
    assert output()[0] == [5.0, 3.0]  # the three others have gone by then


@pytest.mark.parametrize("interfaces", ["", "lo", "lo,lo"])
def test_all_groups_share_the_devices(interfaces: str) -> None:
    """One for each interface that the user named."""
    count = interfaces.count(",") + 1.0
    assert output("shared", GLOO_SOCKET_IFNAME=interfaces) == [[count, 3.0], [count, 3.0]]
