"""Hugging Face folders: reading and writing safetensors, sharded or not, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from perl_megatron.checkpoint.qwen25_vl_table import published_name
from perl_megatron.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
"""What a folder holds beside the weights: config, tokenizer, processor, chat template, generation config."""


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a folder by their published names, read when asked for."""

    def __init__(self, path: Path, files: Mapping[str, Path], stored_names: Mapping[str, str]):
        self.path = path
        self._files, self._stored_names = files, stored_names
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise UserError(f"there is no tensor {name}", where=str(self.path), fix="the checkpoint is not complete")
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = _open_file(file)
            return self._open[file].get_tensor(self._stored_names[name])
        except SafetensorError as error:
            raise UserError(f"cannot read tensor {name}: {error}", where=str(file)) from error

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a folder of safetensors, in one file or in shards, under either naming scheme.

    Reads only the headers. Raises UserError naming the file that is missing, cut short or unreadable, and the tensors
    that the index promises and the files lack.
    """
    path = Path(path)
    promised: dict[str, str] | None = None
    if (path / _INDEX).is_file():
        try:
            promised = json.loads((path / _INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"cannot read the index: {error!r}", where=str(path / _INDEX)) from error
    files = sorted({path / file for file in promised.values()}) if promised is not None else [path / _SINGLE]
    tensors: dict[str, Path] = {}
    stored_names: dict[str, str] = {}
    for file in files:
        for name in _open_file(file).keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            tensors[published_name(name)], stored_names[published_name(name)] = file, name
    missing = sorted({published_name(name) for name in promised or {}} - tensors.keys())
    if missing:
        raise UserError(f"the shards lack tensors that the index lists: {missing}", where=str(path / _INDEX))
    return Checkpoint(path, tensors, stored_names)


def _open_file(file: Path) -> Any:
    if not file.is_file():
        raise UserError(
            "the weight file does not exist", where=str(file), fix="give a folder with safetensors weights, complete"
        )
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot read the weight file, it may be cut short: {error}", where=str(file), fix="copy it again"
        ) from error


def save_checkpoint(
    target: Path | str,
    weights: Iterable[tuple[str, torch.Tensor]],
    source: Path | str,
    *,
    write: bool = True,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write published weights as a Hugging Face folder that transformers and vLLM load.

    Config, tokenizer, processor and the like are copied from the folder ``source``. Memory holds one shard. The folder
    is written under a temporary name beside ``target`` and renamed when whole, so ``target`` is never half-written.
    ``weights`` may be a collective stream: then all ranks call this, and one has ``write`` set; the others only take
    part. Raises UserError where ``target`` exists.
    """
    if not write:
        for _ in weights:
            pass
        return
    target = Path(target)
    if target.exists():
        raise UserError("the target folder exists", where=str(target), fix="choose another or remove it")
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtypes = _write_shards(temporary, weights, max_shard_bytes)
    _copy_companions(Path(source), temporary, dtypes)
    temporary.rename(target)


def _write_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> set[torch.dtype]:
    """One file, or shards with an index; returns the dtypes written."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0
    dtypes = set()

    def flush() -> None:
        nonlocal pending_bytes
        save_file(pending, folder / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtypes.add(tensor.dtype)
    flush()
    if len(shards) == 1:
        (folder / "0.shard").rename(folder / _SINGLE)
        return dtypes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.shard").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return dtypes


def _copy_companions(source: Path, folder: Path, dtypes: set[torch.dtype]) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name != _INDEX:
                shutil.copyfile(file, folder / file.name)
    if len(dtypes) == 1:
        config = json.loads((source / "config.json").read_text())
        _set_dtype(config, str(dtypes.pop()).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """The config says in which dtype loaders build the model; it may differ from the source's."""
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    for section in (config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section, dict) and key in section:
                section[key] = dtype
