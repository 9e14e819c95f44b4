"""Symbolic links inside a data set: whoever packed it may have made some, and they may lead anywhere."""

from __future__ import annotations

import os
from pathlib import Path

from perl_megatron.types import Record


def leaves(image: Path, folder: Path) -> bool:
    """Whether an image below ``folder`` lies elsewhere in truth, by a link of its own or of a folder on the way."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(image)]) != root


def link_problem(record: Record) -> str | None:
    """Why a record is not used whose images lie elsewhere; None where all lie below the folder of its file."""
    folder = Path(record.source.rpartition(":")[0]).parent
    for image in record.images:
        if leaves(image, folder):
            return f"the image {image} is a link that leaves the dataset's folder; data.follow_links=true allows it"
    return None
