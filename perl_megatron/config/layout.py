"""How processes and layers are laid out: sizes that fit the processes, and a policy that splits over them."""

from __future__ import annotations

from collections.abc import Sequence

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.schema import Config, ParallelConfig
from perl_megatron.errors import UserError


def processes_of_a_replica(parallel: ParallelConfig) -> int:
    """Processes that hold one copy of the policy between them: tensor · pipeline · context."""
    return parallel.tensor * parallel.pipeline * parallel.context


def launched_processes(config: Config) -> int:
    """How many processes the command starts when it is not started by torchrun: those of `parallel.data` (or 1)."""
    return processes_of_a_replica(config.parallel) * (config.parallel.data or 1)


def check_layout(parallel: ParallelConfig, world_size: int) -> int:
    """The data-parallel size of `world_size` processes; UserError where the sizes do not fit them or each other."""
    shape = processes_of_a_replica(parallel)
    sizes = f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × context {parallel.context}"
    if world_size % shape:
        raise UserError(
            f"{world_size} processes cannot be laid out as {sizes}",
            where="parallel.tensor, parallel.pipeline, parallel.context",
            fix=f"start a multiple of {shape} processes, or choose sizes whose product divides {world_size}",
        )
    data_size = world_size // shape
    if parallel.data is not None and parallel.data != data_size:
        raise UserError(
            f"{world_size} processes over {sizes} leave data-parallel size {data_size}, not {parallel.data}",
            where=f"parallel.data = {parallel.data}",
            fix=f"start {shape * parallel.data} processes, or set parallel.data={data_size}, or leave it out",
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "sequence parallelism needs tensor parallelism",
            where="parallel.sequence = true",
            fix="set parallel.tensor above 1, or parallel.sequence=false",
        )
    for name, without in (("virtual_pipeline", 1), ("first_stage_layers", None), ("last_stage_layers", None)):
        value = getattr(parallel, name)
        if parallel.pipeline == 1 and value != without:
            raise UserError(
                f"`{name}` needs pipeline parallelism",
                where=f"parallel.{name} = {value}",
                fix=f"set parallel.pipeline above 1, or leave parallel.{name} out",
            )
    return data_size


def check_split(parallel: ParallelConfig, architecture: ArchitectureNumbers) -> None:
    """UserError where the policy does not split over the tensor-parallel ranks or the pipeline stages."""
    language = {
        "attention heads": architecture.num_heads,
        "key-value heads": architecture.num_kv_heads,
        "feed-forward size": architecture.ffn_size,
    }
    vision = {
        "vision heads": architecture.vision_num_heads,
        "vision feed-forward size": architecture.vision_ffn_size,
    }
    split = language | (vision if parallel.vision == "sharded" else {})
    tensor = parallel.tensor
    wrong = {name: size for name, size in split.items() if size % tensor}
    if wrong:
        possible = [size for size in range(1, tensor) if all(number % size == 0 for number in split.values())]
        is_vision_only = not wrong.keys() & language.keys()
        whole = "parallel.vision=replicated leaves the vision tower whole; or " if is_vision_only else ""
        raise UserError(
            f"tensor-parallel size {tensor} does not divide the policy's "
            f"{', '.join(f'{name} ({size})' for name, size in wrong.items())}",
            where=f"parallel.tensor = {tensor}",
            fix=f"{whole}smaller sizes that do: {join_numbers(possible)}; use parallel.pipeline, parallel.context or "
            "parallel.data for more processes",
        )
    stages = stage_layers(parallel, architecture.num_layers)
    chunks = parallel.virtual_pipeline
    if any(layers % chunks for layers in stages):
        possible = [size for size in range(1, min(stages) + 1) if all(layers % size == 0 for layers in stages)]
        raise UserError(
            f"stages of {join_numbers(stages)} layers do not split into {chunks} model chunks each",
            where=f"parallel.virtual_pipeline = {chunks}",
            fix=f"numbers of chunks that do: {join_numbers(possible)}; or change parallel.pipeline, "
            "parallel.first_stage_layers, parallel.last_stage_layers",
        )


def stage_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Language-model layers of each pipeline stage; UserError where `num_layers` cannot be split that way."""
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    named = [layers for layers in (first, last) if layers is not None]
    if parallel.pipeline == 1:
        return (num_layers,)
    others, rest = parallel.pipeline - len(named), num_layers - sum(named)
    if not named and rest % others:
        possible = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
        raise UserError(
            f"pipeline-parallel size {parallel.pipeline} does not divide the policy's {num_layers} layers",
            where=f"parallel.pipeline = {parallel.pipeline}",
            fix=f"sizes that do: {join_numbers(possible)}; or give the first stage fewer layers with "
            "parallel.first_stage_layers, or the last with parallel.last_stage_layers",
        )
    if rest < others or (rest % others if others else rest):
        raise UserError(
            f"{num_layers} layers less {join_numbers(named)} leave {rest} for the other {others} pipeline stages, "
            "which get equally many, at least one each",
            where=f"parallel.first_stage_layers = {first}, parallel.last_stage_layers = {last}",
            fix=f"make them leave a positive multiple of {others}" if others else f"make them add up to {num_layers}",
        )
    middle = [rest // others] * others if others else []
    return (*([first] if first else []), *middle, *([last] if last else []))


def length_multiple(parallel: ParallelConfig) -> int:
    """Padded sequences are a multiple of it.

    Each context rank takes two parts of a sequence, and under sequence parallelism each tensor rank one part of those.
    """
    context = 2 * parallel.context if parallel.context > 1 else 1
    return context * (parallel.tensor if parallel.sequence else 1)


def micro_batch_multiple(parallel: ParallelConfig) -> int:
    """The number of micro-batches is a multiple of it: of the pipeline stages in the interleaved schedule."""
    return parallel.pipeline if parallel.virtual_pipeline > 1 else 1


def join_numbers(numbers: Sequence[int]) -> str:
    """'1, 2, 4', or 'none'."""
    return ", ".join(map(str, numbers)) if numbers else "none"
