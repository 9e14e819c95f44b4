"""Ranks of a small program without a launcher; their store is the test's own process, as under torchrun the agent's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

LONGEST = 300.0
"""Seconds that a rank may take, with its imports, on a machine that does other things too."""


@contextmanager
def running_ranks(worker: Path, *arguments: str, num_ranks: int = 3) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks at work; none is left at the end."""
    store = dist.TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    command, pipe = [sys.executable, str(worker), *arguments], subprocess.PIPE
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True)
        for rank in range(num_ranks)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def end_of(rank: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for it."""
    output, errors = rank.communicate(timeout=LONGEST)
    return subprocess.CompletedProcess(rank.args, rank.returncode, output, errors)


def run_ranks(worker: Path, *arguments: str, num_ranks: int = 3) -> list[subprocess.CompletedProcess[str]]:
    """The worker on several ranks; all of them, at their ends."""
    with running_ranks(worker, *arguments, num_ranks=num_ranks) as ranks:
        return [end_of(rank) for rank in ranks]
