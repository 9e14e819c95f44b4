"""Run by torchrun on 2 or 4 ranks: verifies one layout after the other, as `perl-megatron verify` does.

    torchrun --nproc-per-node 4 matrix_worker.py FOLDER 0,3,7

The numbers say which of ``LAYOUTS`` for so many processes. Writes FOLDER/0.json, the report, as soon as it is known.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from perl_megatron.runtime import platform

platform.install()

import torch  # noqa: E402

from perl_megatron.runtime import garbage, topology  # noqa: E402
from perl_megatron.runtime.collective import world_size  # noqa: E402
from perl_megatron.verification.command import make_case, quiet_libraries, shared_folder, verify_layout  # noqa: E402
from perl_megatron.verification.layout import NUM_LAYERS, Layout  # noqa: E402


def matrix(processes: int) -> list[Layout]:
    """{TP 1, 2, 4} × {PP 1, 2} × {VPP 1, 2} × {SP} × {CP 1, 2} × {DP 1, 2} on so many processes."""
    layouts = []
    for tensor, pipeline, chunks, context, data, sequence in itertools.product(
        (1, 2, 4), (1, 2), (1, 2), (1, 2), (1, 2), (False, True)
    ):
        fits = tensor * pipeline * context * data == processes
        if fits and (pipeline > 1 or chunks == 1) and (tensor > 1 or not sequence):
            sizes = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": chunks}
            layouts.append(Layout.of({**sizes, "context": context, "data": data, "sequence": sequence}))
    return layouts


EXTRAS = {
    2: [
        Layout.of({"tensor": 2, "sequence": True}, tied=True),
        Layout.of({"pipeline": 2}, tied=True),
        Layout.of({"pipeline": 2, "first_stage_layers": 1}),
        Layout.of({"pipeline": 2, "virtual_pipeline": 2}, recompute="full"),
        Layout.of({"tensor": 2, "sequence": True}, recompute="selective"),
        Layout.of({"context": 2}, recompute="full"),
        Layout.of({"tensor": 2, "vision": "replicated"}, recompute="full"),
        Layout.of({"tensor": 2, "sequence": True, "vision": "replicated"}, dtype="bfloat16"),
        Layout.of({"data": 2}, dtype="bfloat16"),
        Layout.of({"pipeline": 2, "virtual_pipeline": 2}, dtype="bfloat16"),
    ],
    4: [
        Layout.of({"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}, tied=True),
        Layout.of({"pipeline": 2, "context": 2}, tied=True),
        Layout.of({"data": 4}),  # a rank has no images
        Layout.of({"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True, "vision": "replicated"}),
        Layout.of({"tensor": 2, "data": 2, "vision": "replicated"}, tied=True),
        Layout.of({"tensor": 2, "context": 2, "vision": "replicated"}),
        # Stages of unequal length, in chunks: the shipped 32B layout in miniature.
        Layout.of(
            {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2},
            recompute="full",
            num_layers=6,
        ),
        Layout.of({"tensor": 2, "context": 2, "sequence": True}, dtype="bfloat16"),
    ],
}
"""The output layer tied, stages of unequal size, recomputation, low precision."""
LAYOUTS = {processes: matrix(processes) + extras for processes, extras in EXTRAS.items()}


def verify_all(folder: Path, out: Path, chosen: Sequence[int]) -> None:
    """Each layout's weights and optimizer go on in the one that follows it in the whole list."""
    layouts, cases = LAYOUTS[world_size()], {}
    for index in chosen:
        layout = layouts[index]
        key = f"{layout.dtype}-{layout.tied}-{layout.num_layers}"
        if key not in cases:
            cases[key] = make_case(folder / key, layout)
            garbage.stay()  # the cases do, and by the first one all libraries are loaded
        following = layouts[(index + 1) % len(layouts)].parallel
        other = layout.elsewhere(following) if layout.num_layers == NUM_LAYERS else layout.other(world_size())
        report = verify_layout(layout, other, cases[key], folder / f"scratch-{index}")
        if report is not None:
            (out / f"{index}.json").write_text(json.dumps(report.as_dict(), allow_nan=False))


def main(out: Path, chosen: Sequence[int]) -> None:
    torch.set_num_threads(1)
    with quiet_libraries(), shared_folder() as folder:
        verify_all(folder, out, chosen)
    topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")])
