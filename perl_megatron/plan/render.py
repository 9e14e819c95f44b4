"""A plan for a kind of device, and the results of a search, as text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from perl_megatron.plan.device_plan import DevicePlan
from perl_megatron.plan.gpus import GIB
from perl_megatron.plan.host_memory import HostMemory
from perl_megatron.plan.memory import StageMemory
from perl_megatron.plan.search import Proposal

WIDTH = 110


def render_device_plan(plan: DevicePlan) -> str:
    """All tables, at most 110 columns wide."""
    return _print(_memory(plan), _engine(plan), _step(plan), _traffic(plan), _remarks(plan), _assumptions(plan))


def render_search(proposals: Sequence[Proposal], tried: int, fitting: int) -> str:
    """The proposals, best first, and what to paste."""
    table = Table(
        title=f"Layouts: {tried} tried, {fitting} fit; the fastest by the roofline",
        title_justify="left",
        pad_edge=False,
    )
    for column in (
        "",
        "tensor",
        "pipeline",
        "virtual",
        "context",
        "data",
        "recompute",
        "engine",
        "its share",
        "tokens",
        "s a step",
    ):
        table.add_column(column, justify="right")
    table.add_column("memory", justify="right")
    for number, one in enumerate(proposals, 1):
        sizes = (one.tensor, one.pipeline, one.virtual_pipeline, one.context, one.data)
        rest = (one.recompute, one.engine_tensor, one.engine_fraction, one.micro_batch_tokens)
        results = (f"{one.seconds:.0f}", f"{one.memory_share:.0%}")
        table.add_row(f"{number}", *map(str, (*sizes, *rest, *results)))
    lines = [f"{number}: {' '.join(one.overrides)}" for number, one in enumerate(proposals, 1)]
    return _print(table) + "\n\nOverrides to paste:\n" + "\n".join(lines)


def _print(*tables: Table) -> str:
    output = io.StringIO()
    console = Console(file=output, width=WIDTH)
    for table in tables:
        console.print(table)
    return output.getvalue().rstrip("\n")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def _memory(plan: DevicePlan) -> Table:
    gpu = plan.device.gpu
    title = f"Memory of a rank, GiB, of {_gib(plan.device.memory)} ({gpu.name}); the first three are exact"
    table = Table(title=title, title_justify="left")
    table.add_column("pipeline stage")
    for stage in plan.stages:
        table.add_column(str(stage.stage), justify="right")

    rows: dict[str, Callable[[StageMemory], float]] = {
        "parameters": lambda one: one.static.parameters,
        "gradients (float32)": lambda one: one.static.gradients,
        "optimizer": lambda one: one.static.optimizer,
        "process": lambda one: one.process,
        "update: language activations": lambda one: one.activations,
        "update: vision activations": lambda one: one.vision_activations,
        "update: backward pass or loss": lambda one: one.work,
        "update: lost by the allocator": lambda one: one.lost,
        "update: engine": lambda one: one.engine.update,
        "weight sync: buckets": lambda one: one.synchronization,
        "weight sync: engine": lambda one: one.engine.sync,
        "generate: engine": lambda one: one.engine.generate,
    }
    for name, value in rows.items():
        table.add_row(name, *(_gib(value(stage)) for stage in plan.stages))
    table.add_row("micro-batches in flight", *(f"{stage.micro_batches_in_flight:g}" for stage in plan.stages))
    for phase in plan.stages[0].phases:
        table.add_row(f"all in {phase}", *(_gib(stage.phases[phase]) for stage in plan.stages))
    table.add_row("peak", *(_peak(stage, plan.device.memory) for stage in plan.stages))
    in_host: dict[str, Callable[[HostMemory], float]] = {
        "host: process": lambda host: host.process,
        "host: reference policy": lambda host: host.reference,
        "host: sleeping engine": lambda host: host.engine,
        "host: copy for a checkpoint": lambda host: host.checkpoint,
        "host: resuming": lambda host: host.resume,
        "host: all": lambda host: host.peak,
    }
    for name, of in in_host.items():
        if any(of(stage.host) for stage in plan.stages):
            table.add_row(name, *(_gib(of(stage.host)) for stage in plan.stages))
    return table


def _peak(stage: StageMemory, memory: float) -> Text:
    return Text(f"{_gib(stage.peak)} ({stage.peak / memory:.0%})", style="bold red" if stage.peak > memory else "bold")


def _engine(plan: DevicePlan) -> Table:
    engine = plan.engine
    table = Table(title="Engine, GiB of each of its ranks", show_header=False, title_justify="left")
    table.add_row("ranks of one", str(engine.tensor_size))
    table.add_row("reserve", _gib(engine.reserve))
    table.add_row("weights", _gib(engine.weights))
    table.add_row("images of one step", _gib(engine.multimodal))
    table.add_row("rest of one step", _gib(engine.step))
    table.add_row("graphs, NCCL", _gib(engine.fixed))
    table.add_row("keys and values", f"{_gib(engine.cache)}: about {engine.concurrent_sequences} sequences at once")
    return table


def _step(plan: DevicePlan) -> Table:
    time = plan.time
    table = Table(title="A step by the roofline (calculated, not measured)", show_header=False, title_justify="left")
    beside = ", beside the update" if time.overlapped else ""
    table.add_row("generate", f"{time.generate:.1f} s{beside}")
    table.add_row(
        "log-probabilities", f"{time.log_probs:.1f} s, of it exchange of weights {time.reference_exchange:.1f} s"
    )
    useful, computed = time.update_flops / 1e15, time.computed_flops / 1e15
    share = f"{time.model_flops_share:.0%} of the peak"
    table.add_row("update", f"{time.update:.1f} s, {useful:.1f} PFLOP of useful work: {share}; {computed:.1f} computed")
    table.add_row(
        "a view, an image of it", f"in {time.view_parts:.3g} micro-batches, encoded {time.image_runs:.3g} times"
    )
    table.add_row("pipeline bubble", f"{time.bubble:.0%} of {time.micro_batches} micro-batches")
    table.add_row("weight sync", f"{time.sync:.1f} s for {time.sync_bytes / 1e9:.1f} GB")
    if time.sleep:
        table.add_row("engine to sleep and back", f"{time.sleep:.1f} s")
    table.add_row("step", f"{time.total:.1f} s")
    return table


def _traffic(plan: DevicePlan) -> Table:
    table = Table(title="Messages of a rank in a step", title_justify="left")
    for column in ("axis", "GB sent", "seconds", "links"):
        table.add_column(column, justify="left" if column in ("axis", "links") else "right")
    for row in plan.time.traffic:
        links = "within a node" if row.within_node else "between nodes"
        table.add_row(row.name, f"{row.bytes_sent / 1e9:.2f}", f"{row.seconds:.2f}", links)
    return table


def _remarks(plan: DevicePlan) -> Table:
    table = Table(title="Remarks", title_justify="left", show_header=False, show_lines=True)
    for remark in plan.remarks:
        fix = f" → {remark.fix}" if remark.fix else ""
        style = "bold red" if remark.level == "cannot run" else ""
        table.add_row(Text(f"{remark.level}: {remark.name}", style=style), Text(f"{remark.text}{fix}"))
    return table


def _assumptions(plan: DevicePlan) -> Table:
    table = Table(title="Assumptions (--assume NAME=VALUE changes one)", title_justify="left")
    for column in ("name", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in plan.device.assumptions.explain():
        table.add_row(row["name"], f"{row['value']:g}", row["meaning"])
    gpu = plan.device.gpu
    table.add_row("layers", "", f"{plan.modules.replace('_', ' ')}'s modules")
    peak = f"{gpu.flops / 1e12:g} TFLOP/s bfloat16, {gpu.bandwidth / 1e12:g} TB/s, links {gpu.link / 1e9:g} GB/s"
    table.add_row("device", "", f"{peak}, network {gpu.network / 1e9:g} GB/s: {gpu.source}")
    table.add_row("devices of a node", f"{gpu.per_node}", plan.device.node_source or "as such nodes usually have")
    return table
