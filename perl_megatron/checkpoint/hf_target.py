"""Writing a Hugging Face folder file by file, from a plan: what ``convert`` needs to be interrupted and go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perl_megatron.checkpoint.file_groups import FileGroup, PlannedTensor, ReadTensor, cut_into_groups
from perl_megatron.checkpoint.hf_files import weight_file_name, write_index
from perl_megatron.checkpoint.qwen25_vl_table import table
from perl_megatron.checkpoint.safetensors_writer import SafetensorsWriter
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.model.architecture import Architecture


class HuggingFaceTarget:
    """The safetensors files of one model."""

    def __init__(self, architecture: Architecture, infos: Mapping[str, TensorInfo], *, max_file_bytes: int):
        """``infos`` are the published tensors as they will be written."""
        self._infos = infos
        published = [entry.published for entry in table(architecture)]
        if len({infos[name].dtype for names in published for name in names}) > 1:
            # Wide numbers first, so that each tensor begins at a multiple of its numbers' size.
            published = [(name,) for names in published for name in names]
            published.sort(key=lambda names: -infos[names[0]].dtype.itemsize)
        sizes = [sum(infos[name].nbytes for name in names) for names in published]
        cut = cut_into_groups(zip(published, sizes, strict=True), max_file_bytes)
        self.groups = [
            FileGroup((weight_file_name(number, len(cut)),), tuple(members), nbytes)
            for number, (members, nbytes) in enumerate(cut)
        ]

    def plan(self) -> list[PlannedTensor]:
        """Every tensor, in the order of writing."""
        return [
            PlannedTensor(name, info.shape, info.dtype, info.nbytes, "published", group.files[0])
            for group in self.groups
            for names in group.published
            for name in names
            for info in [self._infos[name]]
        ]

    def write(self, folder: Path, group: FileGroup, read: ReadTensor) -> list[str]:
        """Write one file; gives the names in it."""
        writer = SafetensorsWriter(folder / group.files[0])
        for names in group.published:
            for name in names:
                writer.add(name, read(name))
        writer.finish(sync=False)
        return writer.names

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        """Write the index, unless there is only one file."""
        files = [group.files[0] for group in self.groups]
        write_index(folder, dict(zip(files, records, strict=True)), sum(group.nbytes for group in self.groups))
