"""One rank of `test_watchdog.py`: rank 1, or the only one, does not do what the others wait for."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from perl_megatron.runtime import watchdog as module
from perl_megatron.runtime.watchdog import Watchdog

how, rank, world_size = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if world_size > 1:
    dist.init_process_group("gloo")
module.HELD_SECONDS = 3.0 if how == "held" else module.HELD_SECONDS


def stall_here():
    if how == "held":
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock, as PyDLL does
    elif how == "stopped":
        # Stopped for good; the test's other ranks say so, and then this one is killed from outside.
        subprocess.Popen(["sh", "-c", f"sleep 12; kill -KILL {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(60)


deadlines = {"update": 1.0, "generate": 50.0} | ({module.BETWEEN: 1.0} if how == "between" else {})
with Watchdog(deadlines, rank=rank, world_size=world_size) as watchdog:
    with watchdog.phase("generate"):
        if world_size > 1:
            dist.all_reduce(torch.zeros(1))
    if how == "between" or (how == "elsewhere" and rank == 1):
        stall_here()
    with watchdog.phase("update"):
        if rank == 1 or world_size == 1:
            stall_here()
        dist.all_reduce(torch.zeros(1))
