"""Planning a conversion: between Hugging Face's format and megatron-core's torch_dist, and between layouts.

``plan_conversion`` reads headers and indices only, and finds everything that does not fit before anything is written;
``Conversion.run`` then streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from perl_megatron.checkpoint.companions import companions
from perl_megatron.checkpoint.conversion import Conversion, Format
from perl_megatron.checkpoint.disk import refuse_existing
from perl_megatron.checkpoint.file_groups import Target
from perl_megatron.checkpoint.hf_target import HuggingFaceTarget
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER
from perl_megatron.checkpoint.read_ahead import BUFFER_BYTES
from perl_megatron.checkpoint.torch_dist_writer import TorchDistTarget
from perl_megatron.checkpoint.weights import TensorInfo, Weights
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import Architecture, read_architecture

MAX_FILE_BYTES = 1 << 30
"""Files end before this, unless a single parameter is larger: an interruption loses the few that are not recorded."""


def plan_conversion(
    source: Path,
    target: Path,
    *,
    to: Format,
    tensor_size: int = 1,
    pipeline_size: int = 1,
    dtype: torch.dtype | None = None,
    companions_from: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    read_ahead_bytes: int = BUFFER_BYTES,
) -> Conversion:
    """Check that ``source`` (any format, any layout) is complete and fits its config.json, and plan the target's files.

    ``companions_from`` is the folder with config.json, tokenizer and so on, where the source has none (a training
    checkpoint). ``dtype`` converts floating-point tensors. Reads headers and indices; writes nothing. Raises UserError
    naming the tensors that are missing, too many or of another shape, where the target exists, and where source and
    ``companions_from`` describe different models.
    """
    refuse_existing(target)
    described_by = companions_from or source
    weights = open_weights(source, config=companions_from)
    architecture = read_architecture(described_by)
    _refuse_two_models(source, described_by, architecture)
    has_tied_copy = _check_tensors(weights, architecture, described_by)
    infos = {name: _converted(weights.info(name), dtype) for name in published_shapes(architecture)}
    plan: Target
    if to == "hf":
        if (tensor_size, pipeline_size) != (1, 1):
            raise UserError("a Hugging Face folder has no layout", where="--tp, --pp", fix="leave them out")
        plan = HuggingFaceTarget(architecture, infos, max_file_bytes=max_file_bytes)
    else:
        plan = TorchDistTarget(
            architecture,
            infos,
            tensor_size=tensor_size,
            pipeline_size=pipeline_size,
            max_file_bytes=max_file_bytes,
        )
    return Conversion(weights, target, described_by, infos, to, plan, has_tied_copy, read_ahead_bytes)


def render_plan(conversion: Conversion) -> Iterator[str]:
    """One line for every tensor, and the totals."""
    rows = conversion.target.plan()
    for row in rows:
        dtype = str(row.dtype).removeprefix("torch.")
        yield f"{row.name}  {list(row.shape)} {dtype}  {row.nbytes:,} bytes  ->  {row.stored}  in {row.file}"
    num_files = sum(len(group.files) for group in conversion.target.groups)
    along = ", ".join(str(file.relative_to(conversion.companions)) for file in companions(conversion.companions))
    yield f"{len(rows)} tensors, {conversion.nbytes:,} bytes, in {num_files} files of {conversion.target_path}"
    yield f"carried along: {along}"


def _refuse_two_models(source: Path, described_by: Path, architecture: Architecture) -> None:
    """The weights would be taken apart as one model and put together as another, which their shapes need not show."""
    own = source / "config.json"
    if own.is_file() and described_by != source and read_architecture(source) != architecture:
        raise UserError(
            "the source and --companions describe different models",
            where=f"{own}, {described_by / 'config.json'}",
            fix="leave out --companions, or remove or replace the wrong config.json",
        )


def _check_tensors(weights: Weights, architecture: Architecture, described_by: Path) -> bool:
    """Names and shapes against the architecture; True where a tied output layer is there as a copy."""
    shapes = published_shapes(architecture)
    extra = set(weights) - shapes.keys()
    has_tied_copy = OUTPUT_LAYER in extra and architecture.tied_embeddings
    if has_tied_copy:
        extra.remove(OUTPUT_LAYER)
        shapes[OUTPUT_LAYER] = shapes[EMBEDDING]
    problems = [f"tensor {name} is missing" for name in sorted(shapes.keys() - set(weights))]
    problems += [f"tensor {name} is not expected" for name in sorted(extra)]
    problems += [
        f"tensor {name} has shape {list(weights.info(name).shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights.info(name).shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"the weights are not what config.json describes: {'; '.join(problems[:20])}{more}",
            where=f"{weights.path}, {described_by / 'config.json'}",
            fix="complete the checkpoint, or give the config.json that belongs to it",
        )
    return has_tied_copy


def _converted(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if dtype is not None and info.dtype.is_floating_point else info
