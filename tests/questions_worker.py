"""Two ranks that read the same file of records, each failing to read an image of its own: both get the same records.

At last one of them cannot read the file at all, and both say so.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

from perl_megatron import questions
from perl_megatron.config.schema import Config
from perl_megatron.data import records
from perl_megatron.errors import UserError
from perl_megatron.runtime import collective
from perl_megatron.types import View


def main(path: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    rank = collective.rank()
    named: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: named.append(entry.getMessage())  # type: ignore[method-assign]
    questions.logger.addHandler(handler)

    def check_image(image: Path) -> None:
        """Rank 0 cannot decode q1's when it reads the records."""
        if (rank, image.name) == (0, "q1.png"):
            raise UserError("cannot read the image")

    def encode(view: View) -> Any:
        """Nor rank 1 that of q3, later; that of q5 is too long for both."""
        if (rank, view.record_id) == (1, "q3"):
            raise UserError("image file not found")
        return SimpleNamespace(token_ids=np.zeros(9000 if view.record_id == "q5" else 9, np.int64))

    records.check_image = check_image
    encoder: Any = SimpleNamespace(encode=encode)
    config = Config.model_validate({"model": {"path": "unused"}, "data": {"max_corrupt_fraction": 0.5}})
    found = questions.read_questions(config, path, "data.train", encoder)
    assert [record.id for record in found] == ["q0", "q2", "q4", "q6", "q7"], found
    dropped = [message for message in named if message.startswith("dropped")]
    assert len(dropped) == (3 if rank == 0 else 0), dropped
    for reason in ["(q1): cannot read", "(q3): image file not found", "(q5): its prompt"] if rank == 0 else []:
        assert sum(reason in message for message in dropped) == 1, dropped

    try:
        questions.read_questions(config, path if rank == 0 else path / "none", "data.train", encoder)
        raise AssertionError(f"rank {rank} was not told")
    except UserError as error:
        met = error.what
    assert "cannot read the dataset" in met, met
    (output / f"{rank}").write_text("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
