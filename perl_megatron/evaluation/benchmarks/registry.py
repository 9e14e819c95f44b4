"""The eight benchmarks of PeRL's table, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perl_megatron.errors import UserError
from perl_megatron.evaluation.benchmarks.benchmark import find_copy
from perl_megatron.evaluation.benchmarks.blink import BLINK
from perl_megatron.evaluation.benchmarks.mantis_eval import MANTIS_EVAL
from perl_megatron.evaluation.benchmarks.math_verse import MATH_VERSE
from perl_megatron.evaluation.benchmarks.math_vision import MATH_VISION
from perl_megatron.evaluation.benchmarks.math_vista import MATH_VISTA
from perl_megatron.evaluation.benchmarks.mmiu import MMIU
from perl_megatron.evaluation.benchmarks.mv_math import MV_MATH
from perl_megatron.evaluation.benchmarks.remi import REMI

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (MANTIS_EVAL, BLINK, MMIU, MATH_VISTA, MATH_VERSE, MATH_VISION, REMI, MV_MATH)
}


def local_copies(names: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """Where the copy of each named benchmark lies; 'all' are all that are there.

    Raises ``UserError`` for an unknown name, a folder that is not set or missing, and benchmarks that are not in it.
    """
    where = f"evaluation.benchmark_folder = {folder}"
    if folder is None or not folder.is_dir():
        what = "there is no folder with benchmarks" if folder is None else f"the folder {folder} does not exist"
        raise UserError(what, where=where, fix="set it to a folder that holds a local copy of each benchmark")
    unknown = [name for name in names if name not in BENCHMARKS and name != "all"]
    if unknown:
        raise UserError(
            f"the benchmark {', '.join(unknown)} is unknown",
            where="evaluation.benchmarks",
            fix=f"choose from {', '.join(BENCHMARKS)}, all",
        )
    wanted = list(BENCHMARKS) if "all" in names else list(dict.fromkeys(names))
    found = {name: find_copy(BENCHMARKS[name], folder) for name in wanted}
    copies = {name: path for name, path in found.items() if path is not None}
    missing = [name for name in wanted if name not in copies]
    if not copies or (missing and "all" not in names):
        there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        expected = "; ".join(
            f"{folder / name} ({BENCHMARKS[name].split} of {BENCHMARKS[name].source}: parquet, JSON or JSON lines)"
            for name in missing
        )
        raise UserError(
            f"there is no copy of {', '.join(missing)}; the folder holds {', '.join(there) or 'nothing'}",
            where=where,
            fix=f"expected: {expected}",
        )
    return copies
