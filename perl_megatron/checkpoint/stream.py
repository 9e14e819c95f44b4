"""The only transport of weights: between a policy spread over ranks and a stream of published tensors.

Parameters go in parts of half a bucket: while the tensors of one part are used, the next one is sent to all pipeline
stages, and the one after it gathered over the tensor-parallel ranks (``transfer``). So memory stays at two buckets,
where a bucket holds the largest parameter twice at least. Every parameter on both sides is matched exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from perl_megatron.checkpoint.qwen25_vl_table import TIED_COPY, Entry, canonical_megatron_name, table
from perl_megatron.checkpoint.transfer import BUCKET_BYTES, Shard, transferred
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import Architecture
from perl_megatron.model.policy import Policy
from perl_megatron.runtime.topology import Topology

Select = Callable[[torch.nn.Parameter], torch.Tensor]
"""What to export of a parameter: its value, or a tensor of its shape such as ``main_grad``."""

Source = Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor]

_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")


def export_weights(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    topology: Topology,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    copies: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, whole tensor) of every weight, on every rank, in one fixed order: a collective of the replica.

    The tensors own their memory; without ``copies`` they may be views of the policy, to be read until it changes. All
    ranks must draw from the iterator in step, to its end. ``bucket_bytes``: what a bucket holds. Raises UserError
    listing the orphans where the policy's parameters are not those of the table.
    """
    return export_tensors(
        chunks,
        architecture,
        topology,
        select=lambda parameter: parameter.detach(),
        bucket_bytes=bucket_bytes,
        copies=copies,
    )


@torch.no_grad()
def export_tensors(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    topology: Topology,
    *,
    select: Select,
    bucket_bytes: int = BUCKET_BYTES,
    copies: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As ``export_weights``, for another tensor of each parameter, such as its gradient."""
    entries = table(architecture, whole_vision=topology.vision_group is not None)
    local = {name: select(parameter) for name, parameter in _parameters(chunks).items()}
    shards = _locate(local, topology)
    _refuse_orphans(entries, architecture, shards)
    for entry, gathered in transferred(entries, local, shards, topology, bucket_bytes):
        parts = entry.op.join(gathered.unbind())
        yield from zip(entry.published, map(_contiguous, parts) if copies else parts, strict=True)


def import_weights(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, topology: Topology, source: Source
) -> None:
    """Fill this rank's parameters from published tensors; each rank reads only what it needs, nothing is communicated.

    ``source`` is a mapping (a checkpoint, a state dict), whose names must be exactly the published ones, or a function
    that gives a tensor by name. Values are converted to each parameter's dtype. Raises UserError listing the orphans
    on either side, and for a tensor of another shape.
    """
    whole_vision = topology.vision_group is not None
    entries = {entry.megatron: entry for entry in table(architecture, whole_vision=whole_vision)}
    if isinstance(source, Mapping):
        expected = [name for entry in entries.values() for name in entry.published]
        _refuse_difference("the checkpoint", "this architecture", source.keys(), expected)
        source = source.__getitem__
    local = _parameters(chunks)
    if architecture.tied_embeddings:
        entries[TIED_COPY] = entries["language_model.embedding.word_embeddings.weight"]
    unknown = sorted(local.keys() - entries.keys())
    if unknown:
        raise UserError(f"the policy has parameters that the table does not know: {', '.join(unknown)}")
    with torch.no_grad():
        for name, parameter in local.items():
            _fill(parameter, name, entries[name], source, topology)


def _fill(
    parameter: torch.nn.Parameter, name: str, entry: Entry, source: Callable[[str], torch.Tensor], topology: Topology
) -> None:
    shard = entry.op.split([source(part) for part in entry.published], topology.tensor_rank, topology.tensor_size)
    if shard.shape != parameter.shape:
        raise UserError(
            f"{', '.join(entry.published)}: shape {tuple(shard.shape)} instead of {tuple(parameter.shape)} for {name}",
            fix="the weights do not belong to this config.json",
        )
    parameter.copy_(shard)


def _parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in the whole model; wrappers around the policies are looked through."""
    named = {}
    for chunk in chunks:
        policy = chunk
        while not isinstance(policy, Policy):
            policy = policy.module  # type: ignore[assignment]
        layers = policy.language_model.decoder.layers
        for name, parameter in policy.named_parameters():
            match = _LAYER.fullmatch(name)
            if match:
                name = f"{match[1]}{layers[int(match[2])].layer_number - 1}{match[3]}"  # noqa: PLW2901
            named[canonical_megatron_name(name)] = parameter
    return named


def _locate(local: Mapping[str, torch.Tensor], topology: Topology) -> dict[str, Shard]:
    """The shards of all pipeline stages; of a tied pair of copies, the first stage's."""
    own = {name: Shard(topology.pipeline_rank, tensor.shape, tensor.dtype) for name, tensor in local.items()}
    stages: list[dict[str, Shard] | None] = [own]
    if topology.pipeline_size > 1:
        stages = [None] * topology.pipeline_size
        dist.all_gather_object(stages, own, group=topology.pipeline_group())
    shards: dict[str, Shard] = {}
    for stage in stages:
        assert stage is not None
        twice = shards.keys() & stage.keys()
        assert not twice, f"held by two stages: {sorted(twice)}"
        shards |= stage
    return shards


def _refuse_orphans(entries: Iterable[Entry], architecture: Architecture, shards: Mapping[str, Shard]) -> None:
    expected = [entry.megatron for entry in entries]
    copies = {TIED_COPY} if architecture.tied_embeddings else set()
    _refuse_difference("the policy", "the table", shards.keys() - copies, expected)


def _refuse_difference(left: str, right: str, names: Iterable[str], expected: Iterable[str]) -> None:
    names, expected = set(names), set(expected)
    if names != expected:
        raise UserError(
            f"{left} and {right} do not match: "
            f"only in {left}: {sorted(names - expected)}; only in {right}: {sorted(expected - names)}"
        )


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own: a part may be a view of the parameter itself or of a buffer shared with others."""
    return tensor.clone(memory_format=torch.contiguous_format)
