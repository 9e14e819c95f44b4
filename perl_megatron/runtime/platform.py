"""The one place that knows whether this machine has CUDA.

Call ``install()`` first in every process that imports megatron-core, transformers or torchvision. With CUDA and a fused
Adam it leaves megatron-core as it is; without CUDA, ``megatron_cpu`` makes it run on the CPU with gloo; without a fused
Adam, ``megatron_adam`` mends its use of torch's.
"""

from __future__ import annotations

import os

import torch

from perl_megatron.runtime import gloo_device, megatron_adam, megatron_cpu, torchvision_schema
from perl_megatron.runtime.environment import cores_of_this_process

_installed = False


def install() -> None:
    """Prepare this process for megatron-core and transformers; idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    torchvision_schema.install()
    if not is_cuda():
        gloo_device.install()
        megatron_cpu.install()
    megatron_adam.install()


def is_cuda() -> bool:
    """Whether this machine has a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its local rank's GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if is_cuda() else torch.device("cpu")


def release_cached_memory() -> None:
    """Give back to the device what torch's allocator keeps of freed tensors; nothing without CUDA."""
    if is_cuda():
        torch.cuda.empty_cache()


def compute_capability() -> tuple[int, int]:
    """(major, minor) of this process's GPU: (9, 0) is Hopper. Only with CUDA."""
    return torch.cuda.get_device_capability(device())


def backend() -> str:
    """The torch.distributed backend for this machine's tensors: 'nccl' or 'gloo'."""
    return "nccl" if is_cuda() else "gloo"


def local_rank() -> int:
    """This process's index on its machine, as torchrun sets it; 0 for a process started by hand."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world size), as torchrun sets them; (0, 1) for a process started by hand."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_torchrun() -> bool:
    """Whether a launcher has set the rendezvous variables that torch.distributed reads."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def set_threads() -> int:
    """On the CPU, share the cores evenly among this machine's ranks; returns the number of threads in use."""
    if not is_cuda():
        torch.set_num_threads(cores_of_this_process())
    return torch.get_num_threads()
