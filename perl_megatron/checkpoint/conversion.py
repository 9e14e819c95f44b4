"""Running a planned conversion: reading ahead, writing group by group, and publishing what is whole.

One Megatron parameter and a buffer of those that are read ahead are in memory. A conversion that is interrupted leaves
``.NAME.partial``, never something with the target's name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

import torch

from perl_megatron.checkpoint.companions import companions, copy_companions
from perl_megatron.checkpoint.disk import WriteFailure, write_failure
from perl_megatron.checkpoint.file_groups import Target
from perl_megatron.checkpoint.manifest import MANIFEST, file_entry, manifest_text, quick_entry, verify_checkpoint
from perl_megatron.checkpoint.partial_folder import PartialFolder
from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER
from perl_megatron.checkpoint.read_ahead import ReadAhead
from perl_megatron.checkpoint.torch_dist_index import COPY_AGAIN, is_torch_dist
from perl_megatron.checkpoint.weights import TensorInfo, Weights
from perl_megatron.errors import UserError

Format = Literal["hf", "torch_dist"]
NUM_BACKGROUND_THREADS = 3
"""One verifies the source; the others wait for the disk and digest, in turn."""
_CHUNK = 1 << 22
"""Numbers that are compared at once."""


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
    read_ahead_bytes: int
    """Size of the buffer of tensors that are read while earlier ones are written."""

    @property
    def nbytes(self) -> int:
        """Of all tensors in the target."""
        return sum(info.nbytes for info in self.infos.values())

    def run(self, *, resume: bool = False, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Convert; ``progress`` gets the bytes of each tensor when its writing begins.

        With ``resume`` finished files of an interrupted conversion with the same source and options are kept; without
        it, an interrupted conversion that is there is refused. Raises UserError for a target that exists or that
        another conversion is writing, a disk that is or gets full, and a source that is damaged.
        """
        describe = file_entry if self.format == "torch_dist" else quick_entry
        partial = PartialFolder(self.target_path, self._fingerprint(), describe=describe, resume=resume)
        try:
            with partial:
                self._check_tied_copy()
                self._check_free_space(partial)
                self._write(partial, progress)
                self._complete(partial)
        except WriteFailure as error:
            fix = f"{error.fix}; with --resume the same command goes on with what is finished"
            raise UserError(error.what, where=error.where, fix=fix) from error

    def _write(self, partial: PartialFolder, progress: Callable[[int], None]) -> None:
        # Waiting for the disk and digesting go on while the next files are written.
        wanted = {number: group for number, group in enumerate(self.target.groups) if number not in partial.records}
        names = [name for group in wanted.values() for together in group.published for name in together]
        coming = [(name, self.infos[name].nbytes) for name in names]
        progress(self.nbytes - sum(group.nbytes for group in wanted.values()))
        stop = Event()
        with (
            ThreadPoolExecutor(NUM_BACKGROUND_THREADS) as workers,
            ReadAhead(self._read, coming, buffer_bytes=self.read_ahead_bytes) as read,
        ):

            def take(name: str) -> torch.Tensor:
                tensor = read(name)
                progress(self.infos[name].nbytes)
                return tensor

            try:
                running: list[Future[None]] = [workers.submit(self._verify_source, stop)]
                for number, group in wanted.items():
                    record = self.target.write(partial.path, group, take)
                    for future in [future for future in running if future.done()]:
                        future.result()  # so that a full disk or a damaged source is not found at the end only
                        running.remove(future)
                    running.append(workers.submit(partial.finish_group, number, group.files, record))
                for future in running:
                    future.result()
            except BaseException:
                stop.set()  # the source may take long, and nobody waits for it; files that are whole are still recorded
                raise

    def _complete(self, partial: PartialFolder) -> None:
        """All that the weights need beside them; then the folder gets its name."""
        try:
            self.target.finish(partial.path, [partial.records[number] for number in range(len(self.target.groups))])
            copy_companions(self.companions, partial.path, {info.dtype for info in self.infos.values()})
            if self.format == "torch_dist":
                self._write_manifest(partial)
            partial.publish()
        except OSError as error:
            raise write_failure(error, "the target", partial.path) from error

    def _read(self, name: str) -> torch.Tensor:
        info, stored = self.infos[name], self.source[name]
        if tuple(stored.shape) != info.shape:
            raise UserError(
                f"tensor {name} has shape {tuple(stored.shape)} instead of {info.shape}", where=str(self.source.path)
            )
        tensor = stored.to(info.dtype)
        if _overflows(stored, tensor):
            raise UserError(
                f"tensor {name} has numbers that {str(info.dtype).removeprefix('torch.')} cannot hold: the largest is "
                f"{torch.finfo(info.dtype).max:g}",
                where=str(self.source.path),
                fix="choose another --dtype, such as bfloat16",
            )
        return tensor

    def _verify_source(self, stop: Event) -> None:
        # A Hugging Face folder may hold a manifest.json of who knows what.
        if is_torch_dist(self.source.path) and (self.source.path / MANIFEST).is_file():
            with _reading(self.source.path):
                verify_checkpoint(self.source.path, fix=COPY_AGAIN, keep_on=lambda: not stop.is_set())

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
        for file in sorted(partial.path.rglob("*")):
            name = str(file.relative_to(partial.path))
            if file.is_file() and name not in entries:
                entries[name] = file_entry(file)
        (partial.path / MANIFEST).write_text(manifest_text(entries), encoding="utf-8")

    def _fingerprint(self) -> str:
        """Of the source's files, those that go along, and all that decides what is written."""
        with _reading(self.source.path):
            stored = [file for file in sorted(self.source.path.iterdir()) if file.is_file()]
            described = [
                self.format,
                [_stamp(file) for file in stored],
                [_stamp(file) for file in companions(self.companions)],
                (self.companions / "config.json").read_text(encoding="utf-8"),
                [(row.name, str(row.dtype), row.stored, row.file) for row in self.target.plan()],
            ]
        return hashlib.blake2b(json.dumps(described).encode(), digest_size=32).hexdigest()


def _stamp(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def _overflows(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a number is finite in ``stored``, and not in the narrower dtype of ``tensor``."""
    if stored.dtype == tensor.dtype or torch.finfo(stored.dtype).max <= torch.finfo(tensor.dtype).max:
        return False
    pairs = zip(stored.flatten().split(_CHUNK), tensor.flatten().split(_CHUNK), strict=True)
    return any(bool((one.isfinite() & ~other.isfinite()).any()) for one, other in pairs)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """What the system cannot read is the source's fault, not the target's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read the source: {error.strerror or error}", where=str(error.filename or source), fix=COPY_AGAIN
        ) from error
