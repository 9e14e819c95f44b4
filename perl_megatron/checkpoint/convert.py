"""Converting a checkpoint: between Hugging Face's format and megatron-core's torch_dist, and between layouts.

``plan_conversion`` reads headers and indices only, and finds everything that does not fit before anything is written.
``Conversion.run`` then streams: one Megatron parameter and a buffer of those that are read ahead are in memory. A
conversion that is interrupted leaves ``.NAME.partial``, never something with the target's name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from perl_megatron.checkpoint.companions import companions, copy_companions
from perl_megatron.checkpoint.file_groups import Target
from perl_megatron.checkpoint.hf_target import HuggingFaceTarget
from perl_megatron.checkpoint.manifest import MANIFEST, file_entry, manifest_text, quick_entry, verify_checkpoint
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.checkpoint.partial_folder import PartialFolder, refuse_existing
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER
from perl_megatron.checkpoint.read_ahead import ReadAhead
from perl_megatron.checkpoint.safetensors_writer import write_failure
from perl_megatron.checkpoint.torch_dist_writer import TorchDistTarget
from perl_megatron.checkpoint.weights import TensorInfo, Weights
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import Architecture, read_architecture

Format = Literal["hf", "torch_dist"]
MAX_FILE_BYTES = 1 << 30
"""Files end before this, unless a single parameter is larger: an interruption loses the few that are not recorded."""
NUM_BACKGROUND_THREADS = 3
"""One verifies the source; the others wait for the disk and digest, in turn."""


@dataclass(frozen=True)
class Conversion:
    """A checked plan; nothing has been written."""

    source: Weights
    target_path: Path
    companions: Path
    """The folder whose config, tokenizer and so on go along."""
    infos: Mapping[str, TensorInfo]
    """The tensors as they will be written."""
    format: Format
    target: Target
    has_tied_copy: bool
    """Whether the source holds the tied embedding a second time, as ``lm_head.weight``."""

    @property
    def nbytes(self) -> int:
        """Of all tensors in the target."""
        return sum(info.nbytes for info in self.infos.values())

    def run(self, *, resume: bool = False, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Convert; ``progress`` gets the bytes of each tensor once it is read.

        With ``resume`` finished files of an interrupted conversion with the same source and options are kept. Raises
        UserError for a target that exists, a disk that is or gets full, and a source that is damaged.
        """
        describe = file_entry if self.format == "torch_dist" else quick_entry
        partial = PartialFolder(self.target_path, self._fingerprint(), describe=describe, resume=resume)
        self._check_tied_copy()
        self._check_free_space(partial)
        try:
            self._write(partial, progress)
            self.target.finish(partial.path, [partial.records[number] for number in range(len(self.target.groups))])
            copy_companions(self.companions, partial.path, {info.dtype for info in self.infos.values()})
            if self.format == "torch_dist":
                self._write_manifest(partial)
            partial.publish()
        except OSError as error:
            failure = write_failure(error, "the target", partial.path)
            raise UserError(failure.what, where=failure.where, fix=f"{failure.fix}, and go on with --resume") from error

    def _write(self, partial: PartialFolder, progress: Callable[[int], None]) -> None:
        # Waiting for the disk and digesting go on while the next files are written.
        wanted = {number: group for number, group in enumerate(self.target.groups) if number not in partial.records}
        names = [name for group in wanted.values() for together in group.published for name in together]
        coming = [(name, self.infos[name].nbytes) for name in names]
        progress(self.nbytes - sum(group.nbytes for group in wanted.values()))
        with (
            ThreadPoolExecutor(NUM_BACKGROUND_THREADS) as workers,
            ReadAhead(lambda name: self._read(name, progress), coming) as read,
        ):
            running: list[Future[None]] = [workers.submit(self._verify_source)]
            for number, group in wanted.items():
                record = self.target.write(partial.path, group, read)
                for future in [future for future in running if future.done()]:
                    future.result()  # so that a full disk or a damaged source is not found at the end only
                    running.remove(future)
                running.append(workers.submit(partial.finish_group, number, group.files, record))
            for future in running:
                future.result()

    def _read(self, name: str, progress: Callable[[int], None]) -> torch.Tensor:
        info = self.infos[name]
        tensor = self.source[name].to(info.dtype)
        if tuple(tensor.shape) != info.shape:
            raise UserError(
                f"tensor {name} has shape {tuple(tensor.shape)} instead of {info.shape}", where=str(self.source.path)
            )
        progress(info.nbytes)
        return tensor

    def _verify_source(self) -> None:
        if (self.source.path / MANIFEST).is_file():
            verify_checkpoint(self.source.path)

    def _check_tied_copy(self) -> None:
        if self.has_tied_copy and not torch.equal(self.source[OUTPUT_LAYER], self.source[EMBEDDING]):
            raise UserError(
                f"tensor {OUTPUT_LAYER} differs from {EMBEDDING}, and config.json says that they are one",
                where=str(self.source.path),
                fix="set tie_word_embeddings to false in config.json if the model has an output layer of its own",
            )

    def _check_free_space(self, partial: PartialFolder) -> None:
        done = sum(entry["size"] for entry in partial.entries.values())
        missing = self.nbytes - done - shutil.disk_usage(partial.path).free
        if missing > 0:
            raise UserError(
                f"the disk has {missing / 1e9:.2f} GB too little space for {self.nbytes / 1e9:.2f} GB of weights",
                where=str(partial.path),
                fix="free some space there, or choose another folder",
            )

    def _write_manifest(self, partial: PartialFolder) -> None:
        entries = dict(partial.entries)
        for file in sorted(partial.path.iterdir()):
            if file.name not in entries and not file.name.endswith(".jsonl"):
                entries[file.name] = file_entry(file)
        (partial.path / MANIFEST).write_text(manifest_text(entries), encoding="utf-8")

    def _fingerprint(self) -> str:
        """Of the source's files and of all that decides what is written."""
        stats = [(file.name, file.stat()) for file in sorted(self.source.path.iterdir()) if file.is_file()]
        described = [
            self.format,
            str(self.companions.resolve()),
            [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            [(row.name, str(row.dtype), row.stored, row.file) for row in self.target.plan()],
        ]
        return hashlib.blake2b(json.dumps(described).encode(), digest_size=32).hexdigest()


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
) -> Conversion:
    """Check that ``source`` (any format, any layout) is complete and fits its config.json, and plan the target's files.

    ``companions_from`` is the folder with config.json, tokenizer and so on, where the source has none (a training
    checkpoint). ``dtype`` converts floating-point tensors. Reads headers and indices; writes nothing. Raises UserError
    naming the tensors that are missing, too many or of another shape, and where the target exists.
    """
    refuse_existing(target)
    described_by = companions_from or source
    weights = open_weights(source, config=companions_from)
    architecture = read_architecture(described_by)
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
    return Conversion(weights, target, described_by, infos, to, plan, has_tied_copy)


def render_plan(conversion: Conversion) -> Iterator[str]:
    """One line for every tensor, and the totals."""
    rows = conversion.target.plan()
    for row in rows:
        dtype = str(row.dtype).removeprefix("torch.")
        yield f"{row.name}  {list(row.shape)} {dtype}  {row.nbytes:,} bytes  ->  {row.stored}  in {row.file}"
    num_files = sum(len(group.files) for group in conversion.target.groups)
    along = ", ".join(file.name for file in companions(conversion.companions))
    yield f"{len(rows)} tensors, {conversion.nbytes:,} bytes, in {num_files} files of {conversion.target_path}"
    yield f"carried along: {along}"


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
