"""`perl-megatron plan`: what would run, without running it. No torch."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config

WIDTH = 110


def make_plan(config: Config, derived: Derived) -> dict[str, Any]:
    """The derived arithmetic and each rank's place, ready for JSON.

    Keys: `run` (name, folder), `batch` and `layout` (numbers of `Derived`), `ranks`: one dict each with rank, tensor,
    data and pipeline coordinates, its language-model layers (0-based, first and last), whether it runs the vision tower
    and whether it computes the logits, and its engine replica.
    """
    numbers = asdict(derived)
    layout_names = (
        *("world_size", "tensor_size", "pipeline_size", "data_size", "layers_per_stage"),
        *("engine", "engine_tensor_size", "engine_replicas"),
    )
    return {
        "run": {"name": config.run.name, "folder": str(config.run.directory / config.run.name)},
        "layout": {
            **{name: numbers[name] for name in layout_names},
            "sequence_parallel": config.parallel.sequence,
            "distributed_optimizer": config.optimizer.distributed,
        },
        "batch": {name: value for name, value in numbers.items() if name not in layout_names},
        "ranks": [rank_place(derived, rank) for rank in range(derived.world_size)],
    }


def rank_place(derived: Derived, rank: int) -> dict[str, Any]:
    """What one rank holds. Ranks are ordered tensor-fastest, then data, then pipeline (megatron-core's order)."""
    tensor = rank % derived.tensor_size
    data = rank // derived.tensor_size % derived.data_size
    pipeline = rank // (derived.tensor_size * derived.data_size)
    first_layer = pipeline * derived.layers_per_stage
    return {
        "rank": rank,
        "tensor": tensor,
        "data": data,
        "pipeline": pipeline,
        "layers": [first_layer, first_layer + derived.layers_per_stage - 1],
        "vision": pipeline == 0,
        "logits": pipeline == derived.pipeline_size - 1,
        "engine_replica": rank // derived.engine_tensor_size,
    }


def render_plan(plan: dict[str, Any]) -> str:
    """The plan as text for a terminal or a log, at most 110 columns wide."""
    output = io.StringIO()
    console = Console(file=output, width=WIDTH)
    console.print(f"Run '{plan['run']['name']}' in {plan['run']['folder']}", highlight=False, markup=False)
    console.print(_batch_table(plan["batch"]))
    console.print(_layout_table(plan["layout"]))
    console.print(_rank_table(plan["ranks"]))
    return output.getvalue().rstrip("\n")


def _batch_table(batch: dict[str, Any]) -> Table:
    views, rollouts = batch["views_per_question"], batch["rollouts_per_view"]
    rows = [
        ("group", f"{views} views × {rollouts} rollouts = {batch['group_size']} responses a question"),
        (
            "step",
            f"{batch['questions_per_step']} questions × {batch['group_size']} = {batch['rollouts_per_step']} responses",
        ),
        (
            "update",
            f"{batch['updates_per_step']} a step, each of {batch['questions_per_update']} questions "
            f"= {batch['sequences_per_update']} sequences = {batch['micro_batches_per_update']} micro-batches a rank",
        ),
        (
            "run",
            f"{batch['total_steps']} steps = {batch['total_updates']} updates = {batch['total_questions']} questions "
            f"= {batch['total_rollouts']} responses trained on",
        ),
        ("sequence", f"at most {batch['max_sequence_tokens']} tokens, prompt and response"),
    ]
    table = Table(title="Batch", show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _layout_table(layout: dict[str, Any]) -> Table:
    sizes = f"tensor {layout['tensor_size']} × pipeline {layout['pipeline_size']} × data {layout['data_size']}"
    sharing = "sharded over data-parallel ranks" if layout["distributed_optimizer"] else "whole on every rank"
    table = Table(title="Layout", show_header=False, title_justify="left")
    table.add_row("processes", f"{layout['world_size']} = {sizes}")
    table.add_row("sequence parallel", "yes" if layout["sequence_parallel"] else "no")
    table.add_row("optimizer", sharing)
    table.add_row(
        "engine",
        f"{layout['engine']}, replicas: {layout['engine_replicas']}, processes in each: {layout['engine_tensor_size']}",
    )
    return table


def _rank_table(ranks: list[dict[str, Any]]) -> Table:
    table = Table(title="Ranks", title_justify="left")
    for column in ("rank", "tensor", "data", "pipeline", "layers", "holds also", "engine replica"):
        table.add_column(column, justify="right")
    for place in ranks:
        also = [name for name, here in (("vision tower", place["vision"]), ("logits", place["logits"])) if here]
        first, last = place["layers"]
        coordinates = (place[axis] for axis in ("rank", "tensor", "data", "pipeline"))
        table.add_row(*map(str, coordinates), f"{first}-{last}", ", ".join(also), str(place["engine_replica"]))
    return table
