"""Two ranks of a node: what one has decoded the other reads. Then both are killed, and their folder is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from perl_megatron.data import image_reader
from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.node_folder import node_pixels
from perl_megatron.runtime import collective


def main(image: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    store = node_pixels(2**20)
    reader = ImageReader(store, 784, 56 * 56)
    folders = collective.gather_objects(str(store._folder))
    assert len(set(folders)) == 1, folders
    if collective.rank() == 0:
        reader.read(image)
    collective.gather_objects(None)
    image_reader.load_image = None  # type: ignore[assignment]
    read = reader.read(image)
    assert read.is_shared
    keys = collective.gather_objects((read.key, read.pixels.tobytes()))
    assert keys[0] == keys[1]
    if collective.rank() == 0:
        assert Path(folders[0], "pixels", f"{read.key}.pixels").is_file()
        output.write_text(folders[0])
    collective.gather_objects(None)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
