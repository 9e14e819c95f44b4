"""`perl-megatron plan`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import sys

from perl_megatron.config.architecture import ArchitectureNumbers, read_architecture_numbers
from perl_megatron.config.derive import derive
from perl_megatron.config.derive_launch import check_nodes, processes_per_node, with_servers
from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import LoadedConfig, load_config
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError
from perl_megatron.plan.assumptions import MOST, Assumptions
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.gpus import GPUS, Gpu, gpu_of
from perl_megatron.plan.node import Node, node_of
from perl_megatron.plan.render import render_device_plan, render_search
from perl_megatron.plan.search import search
from perl_megatron.plan.summary import make_plan, render_plan

CANNOT_RUN = 1
"""Exit status of a plan that does not fit."""


def add_plan_options(command: argparse.ArgumentParser) -> None:
    """What `plan` takes beside a config and settings."""
    text = "number of processes, one on each GPU (default: the fewest that fit the layout)"
    command.add_argument("--processes", "--gpus", type=int, metavar="N", help=text)
    text = f"plan memory, messages and the time of a step on this device: {', '.join(GPUS)}"
    command.add_argument("--gpu", metavar="NAME", help=text)
    text = "what processes can have of each device (default: the data sheet's less the driver's; CPU: of this machine)"
    command.add_argument("--memory-gib", type=float, metavar="GIB", help=text)
    text = "change an assumption of the plan; may be given several times"
    command.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "propose the fastest layouts that fit --processes devices of --gpu, instead of planning the config's"
    command.add_argument("--search", action="store_true", help=text)
    text = "proposals of --search (default: 5)"
    command.add_argument("--top", type=int, default=5, metavar="N", help=text)
    command.add_argument("--json", action="store_true", help="print JSON")


def run_plan(options: argparse.Namespace, argv: list[str]) -> int:
    """Print what follows from a config; status 1 where it cannot run on the device."""
    _check(options)
    gpu = None if options.gpu is None else gpu_of(options.gpu)
    loaded = load_config(options.config, options.overrides)
    numbers = read_architecture_numbers(loaded.config.model.path)
    processes = options.processes or launched_processes(loaded.config)
    node = node_of(loaded.config, processes, gpu)
    device = _device(options, gpu, processes, node)
    elsewhere = device is not None and not device.gpu.is_cpu
    if options.search:
        assert device is not None
        return _search(options, loaded.config, numbers, device, processes=processes, elsewhere=elsewhere)
    config = with_servers(loaded.config)
    derived = derive(config, world_size=processes, architecture=numbers, elsewhere=elsewhere)
    _check_nodes(options, config)
    plan = make_plan(config, derived, numbers, origins=_origins(loaded), node=node)
    if device is None:
        print(json.dumps(plan, indent=2) if options.json else render_plan(plan))
        return 0
    on_device = make_device_plan(config, derived, numbers, device)
    if options.json:
        print(json.dumps(plan | on_device.as_json(), indent=2))
    else:
        print(render_plan(plan))
        print(render_device_plan(on_device))
    for obstacle in on_device.obstacles:
        print(f"cannot run: {obstacle.text}\n  to change: {obstacle.fix}", file=sys.stderr)
    return CANNOT_RUN if on_device.obstacles else 0


def _check_nodes(options: argparse.Namespace, config: Config) -> None:
    """As `launch` does, but where --processes alone says how many there are, not for how many machines."""
    if options.processes is None or config.parallel.data is not None:
        check_nodes(config)
    elif not config.launch.gpus_per_node:
        processes_per_node(config, options.processes)


def _origins(loaded: LoadedConfig) -> dict[str, str]:
    """With those of what ``with_servers`` puts in."""
    number = loaded.config.launch.rollout_nodes
    keys = ("rollout.engine", "rollout.servers") if number else ()
    return loaded.origins | dict.fromkeys(keys, f"launch.rollout_nodes = {number}")


def _search(
    options: argparse.Namespace,
    config: Config,
    numbers: ArchitectureNumbers,
    device: Device,
    *,
    processes: int,
    elsewhere: bool,
) -> int:
    result = search(config, numbers, device, processes=processes, limit=options.top, elsewhere=elsewhere)
    if not result.proposals:
        raise UserError(
            f"of {result.tried} layouts of {processes} processes none fits",
            where=f"--processes {processes} --gpu {device.gpu.key}",
            fix="more processes, a device with more memory, a smaller rollout.gpu_memory_fraction, shorter prompts and "
            "responses" + ("" if result.tried else "; `perl-megatron plan` without --search says what is refused"),
        )
    if options.json:
        rows = [proposal.as_json() for proposal in result.proposals]
        assumptions = device.assumptions.explain()
        whole = {"tried": result.tried, "fitting": result.fitting, "proposals": rows, "assumptions": assumptions}
        print(json.dumps(whole, indent=2))
    else:
        print(render_search(result.proposals, result.tried, result.fitting))
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, value in (
        ("--processes", options.processes),
        ("--memory-gib", options.memory_gib),
        ("--top", options.top),
    ):
        if value is not None and not 0 < value < MOST:
            raise UserError(f"{name} is {value:g}", where=name, fix=f"give a number above 0, below {MOST:g}")
    given = [
        name
        for name, value in (
            ("--search", options.search),
            ("--memory-gib", options.memory_gib),
            ("--assume", options.assume),
        )
        if value
    ]
    if given and options.gpu is None:
        raise UserError(
            f"{', '.join(given)} without a device to plan for", where="--gpu", fix=f"give one of {', '.join(GPUS)}"
        )


def _device(options: argparse.Namespace, gpu: Gpu | None, processes: int, node: Node | None) -> Device | None:
    if gpu is None:
        return None
    assumptions = Assumptions.parse(options.assume)
    return Device.of(gpu, assumptions, processes=processes, memory_gib=options.memory_gib, node=node)
