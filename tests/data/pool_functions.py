"""What workers of the tests do; like everything that a ``WorkerPool`` runs, without torch."""

import os
import signal
import sys
import time
from pathlib import Path

from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.pixel_store import StoredImage
from perl_megatron.errors import UserError
from perl_megatron.types import Record


def work(item: int | str) -> object:
    """The square of a number; what a word says."""
    if isinstance(item, int):
        return item**2
    if item == "modules":
        return sorted({"torch", "pytest", "transformers"} & set(sys.modules))
    if item == "process":
        return os.getpid()
    if item == "refuse":
        raise UserError("it is refused", where="here", fix="nothing")
    if item == "fail":
        raise KeyError("a bug")
    if item == "die":
        os._exit(9)
    time.sleep(3600)
    return None


def note_and_square(item: tuple[str, int]) -> int:
    """The square; leaves a file that says the item was taken."""
    (Path(item[0]) / str(item[1])).touch()
    return item[1] ** 2


def check(record: Record) -> None:
    """Refuses what is asked to be refused, and everything where torch is loaded."""
    if "torch" in sys.modules and "pytest" not in sys.modules:
        raise UserError("torch is loaded in a worker")
    if record.answer == "refuse":
        raise UserError("the answer is refused")


def die_over(record: Record) -> None:
    """Ends the process over text answers."""
    if record.answer_type == "text":
        os._exit(7)


class DyingReader(ImageReader):
    """Whose process is killed as often as there are files ``death…`` beside the image."""

    def read(self, path: Path) -> StoredImage:
        for death in sorted(path.parent.glob("death*")):
            death.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(path)


class SlowReader(ImageReader):
    """Takes its time to decode, and leaves a file that says when."""

    def _decode(self, path: Path, source: str) -> StoredImage:
        begin = time.time()
        time.sleep(0.03)
        image = super()._decode(path, source)
        path.with_suffix(f".{os.getpid()}.times").write_text(f"{begin} {time.time()}")
        return image
