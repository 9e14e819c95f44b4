"""Hugging Face folders: reading and writing safetensors, sharded or not, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from perl_megatron.checkpoint.companions import copy_companions
from perl_megatron.checkpoint.disk import file_inside, publish_folder, refuse_existing, write_failure
from perl_megatron.checkpoint.qwen25_vl_table import published_name
from perl_megatron.checkpoint.safetensors_format import StoredTensor, read_header, read_tensor
from perl_megatron.checkpoint.safetensors_writer import SafetensorsWriter
from perl_megatron.checkpoint.torch_dist_index import is_torch_dist
from perl_megatron.checkpoint.weights import TensorInfo, Weights
from perl_megatron.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint(Weights):
    """The tensors of a folder by their published names, read when asked for and not kept."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Path, StoredTensor]]):
        self.path = path
        self._tensors = tensors
        self._open: dict[Path, BinaryIO] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise UserError(f"there is no tensor {name}", where=str(self.path), fix="the checkpoint is not complete")
        file, stored = self._tensors[name]
        try:
            if file not in self._open:
                self._open[file] = file.open("rb", buffering=0)
            return read_tensor(self._open[file], stored)
        except (OSError, EOFError) as error:
            raise UserError(f"cannot read tensor {name}: {error}", where=str(file), fix="copy it again") from error

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor; reads no tensor."""
        _, stored = self._tensors[name]
        return TensorInfo(stored.shape, stored.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a folder of safetensors, in one file or in shards, under either naming scheme.

    Reads only the headers. Raises UserError naming the file that is missing, cut short, unreadable or outside the
    folder, the tensors that the index promises and the files lack, and a tensor that is there twice.
    """
    path = Path(path)
    if is_torch_dist(path):
        raise UserError(
            "this is a torch_dist checkpoint, and a Hugging Face folder is needed here",
            where=str(path),
            fix=f"python tools/convert_checkpoint.py {path} FOLDER --to hf",
        )
    # transformers reads the single file where there is an index as well.
    sharded = (path / INDEX).is_file() and not (path / SINGLE).is_file()
    promised = _read_index(path / INDEX) if sharded else None
    files = [path / SINGLE]
    if promised is not None:
        files = sorted({file_inside(path, file, named_by=path / INDEX) for file in promised.values()})
    tensors: dict[str, tuple[Path, StoredTensor]] = {}
    for file in files:
        for stored_name, stored in read_header(file).items():
            name = published_name(stored_name)
            if name in tensors:
                raise UserError(
                    f"tensor {name} is there twice: in {tensors[name][0].name} and in {file.name}", where=str(path)
                )
            tensors[name] = file, stored
    missing = sorted({published_name(name) for name in promised or {}} - tensors.keys())
    if missing:
        raise UserError(f"the shards lack tensors that the index lists: {missing}", where=str(path / INDEX))
    return Checkpoint(path, tensors)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor → file."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the index: {error!r}", where=str(index)) from error


def save_checkpoint(
    target: Path | str,
    weights: Iterable[tuple[str, torch.Tensor]],
    source: Path | str,
    *,
    write: bool = True,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write published weights as a Hugging Face folder that transformers and vLLM load.

    Config, tokenizer, processor and the like are copied from the folder ``source``. Memory holds one tensor. The folder
    is written under a temporary name beside ``target``, and renamed when it is whole and on the disk: ``target`` is
    never half-written. ``weights`` may be a collective stream: then all ranks call this, and one has ``write`` set; the
    others only take part. Raises UserError where ``target`` exists, where the disk is full (nothing is left behind
    then), and for a tensor that comes twice.
    """
    if not write:
        for _ in weights:
            pass
        return
    target = Path(target)
    refuse_existing(target)
    temporary = target.with_name(f".{target.name}.export")  # a conversion that can go on has another name
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise write_failure(error, "the checkpoint", temporary) from error
    try:
        shards, dtypes = _write_shards(temporary, weights, max_shard_bytes)
        _publish(temporary, target, shards, Path(source), dtypes)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_shards(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> tuple[list[SafetensorsWriter], set[torch.dtype]]:
    """The finished files, at least one, and the dtypes in them."""
    shards = [SafetensorsWriter(folder / "0.shard")]
    seen: set[str] = set()
    dtypes = set()
    for name, tensor in weights:
        if name in seen:
            raise UserError(f"tensor {name} comes twice", where=str(folder))
        seen.add(name)
        dtypes.add(tensor.dtype)
        shard = shards[-1]
        full = shard.num_bytes + tensor.nbytes > max_shard_bytes or not shard.has_room(name, tensor)
        if full and shard.names:
            shard.finish()
            shards.append(SafetensorsWriter(folder / f"{len(shards)}.shard"))
        shards[-1].add(name, tensor)
        del tensor  # it would live on while the stream makes the next one
    shards[-1].finish()
    return shards, dtypes


def _publish(
    folder: Path, target: Path, shards: Sequence[SafetensorsWriter], source: Path, dtypes: set[torch.dtype]
) -> None:
    """All that the weights need beside them; then the folder gets its name."""
    try:
        _name_shards(folder, shards)
        copy_companions(source, folder, dtypes)
        publish_folder(folder, target)
    except OSError as error:
        raise write_failure(error, "the checkpoint", folder) from error


def _name_shards(folder: Path, shards: Sequence[SafetensorsWriter]) -> None:
    names = [weight_file_name(number, len(shards)) for number in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.path.rename(folder / name)
    contents = {name: shard.names for shard, name in zip(shards, names, strict=True)}
    write_index(folder, contents, sum(shard.num_bytes for shard in shards))


def weight_file_name(number: int, count: int) -> str:
    """Of one of ``count`` files, as published."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, contents: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """List the files (file → the names in it) and the bytes of all tensors, unless there is only one file."""
    if len(contents) == 1:
        return
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file for file, names in contents.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
