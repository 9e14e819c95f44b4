"""The section of the launch: on which machines the processes of a run are started, and how it ends there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from perl_megatron.config.section import Section, as_texts


class LaunchConfig(Section):
    """`perl-megatron launch`: torchrun on several machines, or a Slurm job."""

    nodes: int = Field(default=1, ge=1)
    """Machines that the processes of the layout run on, equally many on each."""
    rendezvous: Literal["static", "c10d"] = "static"
    """How the machines of torchrun find each other: by the rank that each is given (`--node-rank`, or Slurm's), or by
    torchrun's c10d, in any order."""
    endpoint: str = ""
    """HOST:PORT at which the first machine waits for the others; a Slurm job takes its first host and a port of its
    own."""
    rendezvous_timeout: float = Field(default=600.0, gt=0)
    """Seconds in which all machines have to be there."""
    grace_seconds: float = Field(default=120.0, gt=0)
    """Seconds between the signal that ends a run (SIGTERM, SIGUSR1) and the end of its machine: the step is finished if
    that fits, otherwise its groups are kept for the resumed run, and there is a checkpoint. A Slurm job gets the signal
    that long before its time is over."""
    requeue: bool = True
    """Slurm: whether a job whose time is over, whose node is lost, or that is preempted, is queued again, to resume."""
    partition: str = ""
    """Slurm: partition; '' leaves it to Slurm, as for the next two."""
    account: str = ""
    """Slurm: account."""
    qos: str = ""
    """Slurm: quality of service."""
    time: str = ""
    """Slurm: time limit of the job, such as 4:00:00 or 2-0; '': the partition's."""
    gpus_per_node: int = Field(default=0, ge=0)
    """Slurm: GPUs asked for on each machine; 0: none."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Slurm: cores asked for on each machine; None leaves it to Slurm."""
    sbatch_options: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """Slurm: further options, each such as `--constraint=h100` or `--exclusive`."""
    rollout_nodes: int = Field(default=0, ge=0)
    """Slurm: further machines of the job, on which `perl-megatron serve` samples for the trainer; 0: none."""
    server_port: int = Field(default=8000, ge=1024, le=65000)
    """Port of the first rollout server of a machine; further ones take the next ports."""
    environment: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """NAME=VALUE of variables that are set in a Slurm job, beside those of the shell that submits it."""
    setup_file: Path | None = None
    """A shell script that a Slurm job reads first (modules to load, an environment to activate)."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """Slurm: what runs the processes in launch.container_image."""
    container_image: str = ""
    """Image of the container: for pyxis `registry#image:tag` or a .sqsh file, for apptainer a .sif file or a URI."""
    container_mounts: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """What a container sees of its machine beside the current directory: `/path`, or `/path:/path/inside`."""
    python: str = ""
    """Slurm: the Python that has this package; '': the one that submits, and in a container `python`."""
