"""The machines of a run: how many of its processes are on each, and what says so. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from perl_megatron.config.derive_launch import filled_node
from perl_megatron.config.launch_section import LaunchConfig
from perl_megatron.config.layout import launched_processes
from perl_megatron.config.schema import Config
from perl_megatron.plan.gpus import Gpu


@dataclass(frozen=True)
class Node:
    """A machine of the run."""

    size: int
    """Its processes, each with a device."""
    source: str
    """What says so."""


def node_of(config: Config, processes: int, gpu: Gpu | None) -> Node | None:
    """By the section `launch`, else by the device; None where neither says anything.

    ``processes``: of the run that is planned, which need not be those of the config.
    """
    launch = config.launch
    if launch.gpus_per_node:
        return Node(launch.gpus_per_node, "launch.gpus_per_node")
    own = processes if config.parallel.data is None else launched_processes(config)
    if launch.nodes > 1 and own % launch.nodes == 0:
        return Node(own // launch.nodes, f"{own} processes on launch.nodes = {launch.nodes}")
    if gpu is None:
        return None
    if gpu.is_cpu:
        return Node(processes, "all on this machine")
    return Node(gpu.per_node, "as such nodes usually have, for launch.gpus_per_node is not set")


def launch_for(launch: LaunchConfig, processes: int, size: int) -> LaunchConfig:
    """The section for so many processes, on machines of ``size``, or of the greatest smaller size that they fill."""
    here = filled_node(processes, size)
    return launch.model_copy(update={"nodes": processes // here, "gpus_per_node": here if launch.gpus_per_node else 0})
