"""A run on several machines of the Slurm job around this process: a step of it, such as a trial of a sweep."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.launch.slurm import FIRST_PORT, NUM_PORTS, python_words, srun_options

ANSWER_SECONDS, ASK_AGAIN_SECONDS = 60.0, 2.0
"""How long Slurm may not answer, as while its controller is restarted; and the time between two questions."""


@dataclass(frozen=True)
class SlurmJob:
    """The job around this process."""

    number: str
    num_nodes: int
    endpoint: str
    """HOST:PORT on its first machine, where those of a run meet."""

    @staticmethod
    def is_here() -> bool:
        """Whether there is one; Slurm is not asked."""
        return "SLURM_JOB_ID" in os.environ

    @classmethod
    def around(cls, on_wait: Callable[[], None]) -> SlurmJob:
        """The one that there is, by one look for the whole life of this process.

        ``on_wait`` is called again and again while Slurm does not answer, and may raise. UserError where it does not
        for ``ANSWER_SECONDS``.
        """
        number, nodes = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_JOB_NUM_NODES", "1")
        until = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                # Slurm's own addresses: a host's name need not be one that the others can look up.
                first = _ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
                address = re.search(r" NodeAddr=(\S+)", _ask("scontrol", "--oneliner", "show", "node", first))
            except UserError:
                on_wait()
                if time.monotonic() > until:
                    raise
                time.sleep(ASK_AGAIN_SECONDS)
                continue
            port = FIRST_PORT + int(number) % NUM_PORTS
            return cls(number, int(nodes), f"{address[1] if address else first}:{port}")


@dataclass(frozen=True)
class JobStep:
    """How `perl-megatron launch torchrun` is started on the first machines of the job, once on each."""

    head: tuple[str, ...]
    """`srun` with its options, and the Python."""
    settings: tuple[str, ...]
    """Where the machines meet, as settings that win over the config's."""

    @classmethod
    def of(cls, config: Config, job: SlurmJob | None) -> JobStep | None:
        """For runs of this config; None for those of one machine, and outside of a job.

        Raises UserError where the job has too few machines.
        """
        nodes = config.launch.nodes
        if nodes == 1 or job is None:
            return None
        if job.num_nodes < nodes:
            fix = f"ask Slurm for {nodes} (--nodes={nodes}), or set launch.nodes={job.num_nodes}"
            what = f"Slurm job {job.number} has {job.num_nodes} machines"
            raise UserError(what, where=f"launch.nodes = {nodes}", fix=fix)
        where = (f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--relative=0")
        srun = ("srun", *srun_options(config), *where, "--export=ALL", "--kill-on-bad-exit=0", "--wait=300")
        place = ("launch.rendezvous=static", f"launch.endpoint={job.endpoint}")
        return cls((*srun, *python_words(config), "-m", "perl_megatron"), place)

    def train_command(self, arguments: Sequence[str], stop_file: Path) -> list[str]:
        """Train by config and settings; the run stops, as by SIGUSR1, when the file appears.

        SIGTERM for `srun` ends it at once, on all machines.
        """
        head = [*self.head, "launch", "torchrun", "--job", "train", "--stop-file", str(stop_file)]
        return [*head, *arguments, *self.settings]


def _ask(*command: str) -> str:
    fix = "start it inside of a Slurm job whose controller answers"
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"Slurm cannot be asked: {error}", where=" ".join(command), fix=fix) from error
    if answer.returncode != 0:
        raise UserError(f"Slurm does not answer: {answer.stderr.strip()}", where=" ".join(command), fix=fix)
    return answer.stdout
