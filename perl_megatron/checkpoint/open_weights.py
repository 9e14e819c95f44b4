"""One way to open weights, whatever format they are in."""

from __future__ import annotations

from pathlib import Path

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.torch_dist_index import is_torch_dist
from perl_megatron.checkpoint.torch_dist_reader import open_torch_dist
from perl_megatron.checkpoint.weights import Weights
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture


def open_weights(path: Path, *, config: Path | None = None) -> Weights:
    """The published tensors of a Hugging Face folder, a torch_dist folder or a training checkpoint, in any layout.

    Reads only headers and indices. torch_dist does not say what model it holds: that is in its own ``config.json``, or
    in that of the folder ``config``. Raises UserError where that is missing, and for all that the format's own reader
    finds wrong.
    """
    if not path.is_dir():
        raise UserError("there is no such folder", where=str(path))
    if not is_torch_dist(path):
        return open_checkpoint(path)
    described_by = path if (path / "config.json").is_file() else config
    if described_by is None:
        raise UserError(
            "this torch_dist checkpoint has no config.json",
            where=str(path),
            fix="name the Hugging Face folder of the model that it was trained from as well",
        )
    return open_torch_dist(path, read_architecture(described_by))
