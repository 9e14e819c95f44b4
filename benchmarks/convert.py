"""Conversion against `cp`: `python benchmarks/convert.py [--quick] [--folder DIR] [--json FILE]`.

Random weights of the true shapes go from Hugging Face's format to torch_dist and back; the result is compared bit for
bit with what was put in. Each direction takes turns with `cp -r` of the same folder on the same disk, in fresh
processes; the source is read once before, so that both find it in the same state. Ours is timed from the plan to the
renamed folder, without Python's imports, and with everything on the disk and digested; for `cp` the time until its
bytes are on the disk is a row of its own. Peak memory is VmHWM: what the process held resident at most, pages of files
included. The mapping of the tensors alone, in memory, is compared with mbridge's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as tools/convert_checkpoint.py does

from side_by_side import Row, make_row, report, resident_gib, run_in_turn

from perl_megatron.checkpoint.conversion import Format
from perl_megatron.checkpoint.convert import plan_conversion

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "make_random_weights.py"
THREE_B, SMALL = ROOT / "examples" / "qwen2_5_vl" / "3b", ROOT / "benchmarks" / "small_model"
MEMORY_GOAL_GIB = 3e9 / 2**30
TIME_GOAL = 2.0
MAPPING = "mapping"
DIRECTIONS: dict[str, tuple[str, str, Format]] = {
    "HF to torch_dist": ("source", "torch_dist", "torch_dist"),
    "torch_dist to HF": ("torch_dist", "hf", "hf"),
}


def read_once(folder: Path) -> None:
    """Into the page cache, as far as it goes."""
    buffer = bytearray(1 << 24)
    for file in sorted(folder.iterdir()):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def work(name: str, direction: str, folder: Path) -> dict[str, float]:
    """One conversion or one copy."""
    source_name, target_name, to = DIRECTIONS[direction]
    source, target = folder / source_name, folder / target_name
    copy = folder / "copy"
    # Ours of the last round stays where cp comes last: it is the next direction's source.
    shutil.rmtree(target if name == "ours" else copy, ignore_errors=True)
    os.sync()
    read_once(source)
    if name == "ours":
        from transformers import PreTrainedConfig, Qwen2_5_VLConfig  # noqa: F401 - config.json is read with them

    begin = time.perf_counter()
    if name == "ours":
        plan_conversion(source, target, to=to).run()
        return {"seconds": time.perf_counter() - begin, "memory_gib": resident_gib("VmHWM")}
    subprocess.run(["cp", "-r", source, copy], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", "-f", copy], check=True)
    synced = time.perf_counter()
    shutil.rmtree(copy)
    return {"seconds": copied - begin, "synced_seconds": synced - begin}


def work_on_mapping(name: str, folder: Path) -> dict[str, float]:
    """The mapping by ``name``."""
    from mbridge_mapping import map_all  # mbridge imports megatron-core, which conversion does not need

    return map_all(name, folder / "source")


def run_mapping(folder: Path, rounds: int) -> list[Row]:
    """The tensors' mapping there and back, without reading and writing them."""
    arguments = ["--direction", MAPPING, "--folder", str(folder)]
    results = run_in_turn(Path(__file__), ["mbridge", "ours"], arguments, rounds=rounds, threads=1)
    ours, theirs = ([each["mapping_seconds"] for each in results[name]] for name in ("ours", "mbridge"))
    return [make_row("mapping there and back, in memory", ours, "mbridge", theirs, "s", None)]


def run_direction(direction: str, folder: Path, rounds: int) -> list[Row]:
    arguments = ["--direction", direction, "--folder", str(folder)]
    results = run_in_turn(Path(__file__), ["cp", "ours"], arguments, rounds=rounds, threads=1)
    ours, copies = results["ours"], results["cp"]
    seconds = [each["seconds"] for each in ours]
    return [
        make_row(direction, seconds, "cp", [each["seconds"] for each in copies], "s", TIME_GOAL),
        make_row(direction, seconds, "cp + sync", [each["synced_seconds"] for each in copies], "s", None),
        make_row(
            f"{direction}: peak memory",
            [each["memory_gib"] for each in ours],
            "3 GB",
            [MEMORY_GOAL_GIB] * rounds,
            "GiB",
            1.0,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model, one round (else the 3B's, 30 GB of disk)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side and direction")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--direction", choices=(*DIRECTIONS, MAPPING), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        mapping = options.direction == MAPPING
        name, folder = options.worker, options.folder
        print(json.dumps(work_on_mapping(name, folder) if mapping else work(name, options.direction, folder)))
        return
    rounds, config = (1, SMALL) if options.quick else (options.rounds, THREE_B)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        subprocess.run([sys.executable, TOOL, folder / "source", "--config", config], check=True)
        for direction in DIRECTIONS:
            rows += run_direction(direction, folder, rounds)
        rows += run_mapping(folder, rounds)
        command = [sys.executable, "-m", "perl_megatron", "verify-weights", folder / "source", folder / "hf"]
        if subprocess.run(command, check=False).returncode:
            sys.exit("the weights did not come back bit for bit")
    report(f"conversion, {'small' if options.quick else '3B'} shapes, bfloat16", rows, options.json)


if __name__ == "__main__":
    main()
