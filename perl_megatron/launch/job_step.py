"""A run on several machines of the Slurm job around this process: a step of it, such as a trial of a sweep."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.launch.slurm import FIRST_PORT, NUM_PORTS, python_words, srun_options


@dataclass(frozen=True)
class JobStep:
    """How `perl-megatron launch torchrun` is started on the first machines of the job, once on each."""

    head: tuple[str, ...]
    """`srun` with its options, and the Python."""
    settings: tuple[str, ...]
    """Where the machines meet, as settings that win over the config's."""

    @classmethod
    def of(cls, config: Config) -> JobStep | None:
        """For runs of this config; None for those of one machine, and outside of a Slurm job.

        Raises UserError where the job has too few machines, or Slurm does not answer.
        """
        nodes, job = config.launch.nodes, os.environ.get("SLURM_JOB_ID")
        if nodes == 1 or job is None:
            return None
        here = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        if here < nodes:
            fix = f"ask Slurm for {nodes} (--nodes={nodes}), or set launch.nodes={here}"
            raise UserError(f"Slurm job {job} has {here} machines", where=f"launch.nodes = {nodes}", fix=fix)
        # Slurm's own addresses: a host's name need not be one that the others can look up.
        first = _ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
        address = re.search(r" NodeAddr=(\S+)", _ask("scontrol", "--oneliner", "show", "node", first))
        port = FIRST_PORT + int(job) % NUM_PORTS
        place = ("launch.rendezvous=static", f"launch.endpoint={address[1] if address else first}:{port}")
        where = (f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--relative=0")
        srun = ("srun", *srun_options(config), *where, "--export=ALL", "--kill-on-bad-exit=0", "--wait=300")
        return cls((*srun, *python_words(config), "-m", "perl_megatron"), place)

    def train_command(self, arguments: Sequence[str], stop_file: Path) -> list[str]:
        """Train by config and settings; the run stops, as by SIGUSR1, when the file appears.

        SIGTERM for `srun` ends it at once, on all machines.
        """
        head = [*self.head, "launch", "torchrun", "--job", "train", "--stop-file", str(stop_file)]
        return [*head, *arguments, *self.settings]


def _ask(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        fix = "start it inside of a Slurm job whose controller answers"
        raise UserError(f"Slurm does not answer: {answer.stderr.strip()}", where=" ".join(command), fix=fix)
    return answer.stdout
