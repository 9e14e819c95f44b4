"""`perl-megatron plan`: what would run, without running it. No torch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.load import DEFAULT
from perl_megatron.config.schema import Config
from perl_megatron.config.yaml_source import dump_scalar
from perl_megatron.plan.node import Node
from perl_megatron.plan.workload import longest_update

WIDTH = 110
_SHARED = {
    "full": "each image of a micro-batch, each prompt for all responses to it",
    "vision": "each image of a micro-batch",
    "none": "nothing",
}


def make_plan(
    config: Config,
    derived: Derived,
    architecture: ArchitectureNumbers,
    *,
    origins: Mapping[str, str] | None = None,
    node: Node | None = None,
) -> dict[str, Any]:
    """The derived arithmetic and each rank's place, ready for JSON. ``origins`` are those of a ``LoadedConfig``;
    ``node``: a machine of the run, where that is known.

    Keys: `run` (name, folder), `settings` (by dotted key the value and the origin of all that is not left to the
    default; none without ``origins``), `batch` and `layout` (numbers of `Derived`, and the most micro-batches that an
    update may take), `ranks`: one dict each with rank,
    tensor, context, data and pipeline coordinates, its language-model layers (0-based), whether it runs the vision
    tower and whether it computes the logits, and its engine replica (null with servers, all of which it may ask).
    """
    numbers = asdict(derived)
    layout_names = (
        *("world_size", "tensor_size", "pipeline_size", "context_size", "data_size"),
        *("virtual_pipeline_size", "stage_layers"),
        *("engine", "engine_tensor_size", "engine_replicas"),
    )
    return {
        "run": {"name": config.run.name, "folder": str(config.run.directory / config.run.name)},
        "settings": {
            key: {"value": _plain(getattr(getattr(config, key.split(".")[0]), key.split(".")[1])), "origin": origin}
            for key, origin in (origins or {}).items()
            if origin != DEFAULT
        },
        "layout": {
            **{name: numbers[name] for name in layout_names},
            "sequence_parallel": config.parallel.sequence,
            "vision": config.parallel.vision,
            "distributed_optimizer": config.optimizer.distributed,
            "node": None if node is None else asdict(node),
        },
        "batch": {
            **{name: value for name, value in numbers.items() if name not in layout_names},
            "sharing": config.actor.sharing,
            "most_micro_batches": longest_update(config, derived, architecture),
        },
        "ranks": [rank_place(derived, rank) for rank in range(derived.world_size)],
    }


def rank_place(derived: Derived, rank: int) -> dict[str, Any]:
    """What one rank holds. Ranks are ordered tensor-fastest, then context, data, pipeline (megatron-core's order)."""
    tensor = rank % derived.tensor_size
    context = rank // derived.tensor_size % derived.context_size
    data = rank // (derived.tensor_size * derived.context_size) % derived.data_size
    pipeline = rank // (derived.tensor_size * derived.context_size * derived.data_size)
    return {
        "rank": rank,
        "tensor": tensor,
        "context": context,
        "data": data,
        "pipeline": pipeline,
        "layers": layers_of(derived, pipeline),
        "vision": pipeline == 0,
        "logits": pipeline == derived.pipeline_size - 1,
        "engine_replica": None if derived.engine == "server" else rank // derived.engine_tensor_size,
    }


def layers_of(derived: Derived, pipeline: int) -> list[int]:
    """0-based layers of a stage: one run of them for each model chunk, the chunks of all stages taking turns."""
    per_chunk = [layers // derived.virtual_pipeline_size for layers in derived.stage_layers]
    layers: list[int] = []
    for chunk in range(derived.virtual_pipeline_size):
        first = chunk * sum(per_chunk) + sum(per_chunk[:pipeline])
        layers += range(first, first + per_chunk[pipeline])
    return layers


def render_plan(plan: dict[str, Any]) -> str:
    """The plan as text for a terminal or a log, at most 110 columns wide."""
    output = io.StringIO()
    console = Console(file=output, width=WIDTH)
    console.print(f"Run '{plan['run']['name']}' in {plan['run']['folder']}", highlight=False, markup=False)
    if plan["settings"]:
        console.print(_settings_table(plan["settings"]))
    console.print(_batch_table(plan["batch"]))
    console.print(_layout_table(plan["layout"]))
    console.print(_rank_table(plan["ranks"]))
    return output.getvalue().rstrip("\n")


def _plain(value: Any) -> Any:
    """For JSON: a path as text, a tuple as a list."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _settings_table(settings: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Settings (all others are defaults)", title_justify="left")
    for column in ("key", "value", "set by"):
        table.add_column(column, overflow="fold")
    for key, setting in settings.items():
        table.add_row(key, Text(dump_scalar(setting["value"])), Text(setting["origin"]))
    return table


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
            f"= {batch['sequences_per_update']} sequences, at most {batch['most_micro_batches']} micro-batches a rank",
        ),
        (
            "run",
            f"{batch['total_steps']} steps = {batch['total_updates']} updates = {batch['total_questions']} questions "
            f"= {batch['total_rollouts']} responses trained on",
        ),
        ("computed once", _SHARED[batch["sharing"]]),
        ("sequence", f"at most {batch['max_sequence_tokens']} tokens, prompt and response"),
    ]
    table = Table(title="Batch", show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _layout_table(layout: dict[str, Any]) -> Table:
    sizes = " × ".join(f"{axis} {layout[f'{axis}_size']}" for axis in ("tensor", "pipeline", "context", "data"))
    sharing = "sharded over data-parallel ranks" if layout["distributed_optimizer"] else "whole on every rank"
    table = Table(title="Layout", show_header=False, title_justify="left")
    table.add_row("processes", f"{layout['world_size']} = {sizes}")
    if (node := layout["node"]) is not None:
        of_each = f", {node['size']} processes on each" if layout["world_size"] > node["size"] else ""
        machines = -(-layout["world_size"] // node["size"])
        table.add_row("machines", f"{machines}{of_each} ({node['source']})")
    table.add_row("layers of a stage", f"{layout['stage_layers']}, in {layout['virtual_pipeline_size']} model chunk(s)")
    table.add_row("sequence parallel", "yes" if layout["sequence_parallel"] else "no")
    if layout["tensor_size"] > 1:
        whole = "whole on every tensor-parallel rank, which encodes its share of the images"
        tower = "sharded over tensor-parallel ranks" if layout["vision"] == "sharded" else whole
        table.add_row("vision tower", tower)
    table.add_row("optimizer", sharing)
    engine = f"{layout['engine']}, replicas: {layout['engine_replicas']}"
    processes = f"processes in each: {layout['engine_tensor_size']}"
    table.add_row("engine", engine if layout["engine"] == "server" else f"{engine}, {processes}")
    return table


def _rank_table(ranks: list[dict[str, Any]]) -> Table:
    table = Table(title="Ranks", title_justify="left")
    for column in ("rank", "tensor", "context", "data", "pipeline", "layers", "holds also", "engine replica"):
        table.add_column(column, justify="right")
    for place in ranks:
        also = [name for name, here in (("vision tower", place["vision"]), ("logits", place["logits"])) if here]
        coordinates = (place[axis] for axis in ("rank", "tensor", "context", "data", "pipeline"))
        replica = "any" if place["engine_replica"] is None else str(place["engine_replica"])
        table.add_row(*map(str, coordinates), _runs(place["layers"]), ", ".join(also), replica)
    return table


def _runs(numbers: list[int]) -> str:
    """'0-3, 8-11' for ascending numbers."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{first}-{last}" for first, last in zip(starts, ends, strict=True))
