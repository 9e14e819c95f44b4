"""The environment variables that other people's libraries read: what is set, and why. A user's own value wins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_PROCESS = {
    # One OpenMP thread a process: ranks, vLLM's kernels and torch would otherwise spin against each other for the same
    # cores (a factor of ten in tokens/s on two cores). torchrun sets the same.
    "OMP_NUM_THREADS": "1",
    # Checkpoints are folders; nothing may be looked for on a hub, which hangs where there is no network.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # The tokenizer's threads do not survive a fork (data loaders, checkpoint writers) and then warn on every one.
    "TOKENIZERS_PARALLELISM": "false",
}

_VLLM = {
    # The engine core in this process: weights are handed over by reference, and torchrun's ranks are the workers.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # No usage reports.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Its messages and (on a CPU dozens of) warnings about its own settings would bury the run's own lines.
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_VLLM_SERVER = {
    # The routes by which weights are brought and workers are called.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Below that it warns, after every update, of the layers that have no weights.
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_VLLM_SERVER_CPU = {
    # One worker works in the engine's process, as on a GPU, and not in one of its own, which takes half as long again
    # to start. vLLM parts them on a CPU to bind each worker's threads to cores, which `nobind` leaves alone.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

_SERVER_KEY = "VLLM_API_KEY"
"""vLLM's own name for it."""

_VLLM_CPU = {
    # Leave the trainer's threads where they are; binding would put every rank on its own cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Some of vLLM's functions are compiled on first use even in eager mode: half a minute for nothing on a CPU.
    "TORCH_COMPILE_DISABLE": "1",
}


def prepare_process() -> None:
    """Set what every process of a run needs; call it before torch and transformers are imported."""
    _set_defaults(_PROCESS)


def prepare_vllm(*, cuda: bool) -> None:
    """Set what vLLM reads; call it before vLLM is imported."""
    _set_defaults(_VLLM if cuda else _VLLM | _VLLM_CPU)


def prepare_vllm_server(*, cuda: bool) -> None:
    """Set what a server of vLLM's reads; call it before vLLM is imported."""
    _set_defaults(_VLLM_SERVER if cuda else _VLLM_SERVER | _VLLM_CPU | _VLLM_SERVER_CPU)


def set_server_key(key: str | None) -> None:
    """Let a server in this process demand ``key``; its workers inherit it, which a command line would show to all."""
    if key is None:
        os.environ.pop(_SERVER_KEY, None)
    else:
        os.environ[_SERVER_KEY] = key


def server_key() -> str | None:
    """What `set_server_key` set."""
    return os.environ.get(_SERVER_KEY)


def cores_of_this_process() -> int:
    """Cores that this process may keep busy: its machine's, shared evenly with the other ranks there; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def vllm_leaves_alone() -> Iterator[None]:
    """Undo what vLLM on a CPU does to variables that are not its own.

    It rewrites LOCAL_WORLD_SIZE (which torchrun set and the trainer reads) and adds libraries to LD_PRELOAD (which
    every process started later would load).
    """
    with _restored("LOCAL_WORLD_SIZE", "LD_PRELOAD"):
        yield


@contextlib.contextmanager
def weights_only_loads() -> Iterator[None]:
    """Within the block torch.load unpickles tensors and plain values only, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _restored(name):
        os.environ[name] = "1"
        yield


@contextlib.contextmanager
def _restored(*names: str) -> Iterator[None]:
    """The variables are afterwards what they were before."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _set_defaults(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)
