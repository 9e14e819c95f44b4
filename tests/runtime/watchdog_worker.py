"""One rank of `test_watchdog.py`: rank 1, or the only one, does not do what the others wait for."""

import ctypes
import os
import signal
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
        ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock, as PyDLL does
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)  # for good: the test kills it when the others have ended
    else:
        time.sleep(600)


if how == "in_time":
    module.POLL_SECONDS, module.HELD_SECONDS = 0.01, 0.0
    with Watchdog({"outer": 60.0, "inner": 2.0}, rank=0, world_size=1) as watchdog, watchdog.phase("outer"):
        begin = time.monotonic()
        while time.monotonic() - begin < 2.5:
            with watchdog.phase("inner"):
                time.sleep(0.05)
    print("inner phases took long enough")
    sys.exit()

# With several ranks, so long that all others wait in their collective by then.
seconds = 1.0 if world_size == 1 else 3.0
deadlines = {"update": seconds, "generate": 500.0} | ({module.BETWEEN: 1.0} if how == "between" else {})
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
