"""Decoded images in the processes of a node: `python benchmarks/pixels.py [--quick] [--json FILE]`.

200 JPEG images of 512 × 512 pixels (504 × 504 for the policy) are read by 1, 2 and 4 processes of one node, one process
after the other. Ours share the pixels and keep no patches. The peer is what this project had before: each process
decodes for itself and keeps images and float32 patches, up to 512 MiB of each. Memory is the PSS of all processes, less
what each had after its imports, and the shared files, which belong to no process. Patches are made from the pixels of
an image by the table of `data/patches.py`, and by the image processor of transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from side_by_side import Row, make_row, report, run_in_turn

from perl_megatron.data.cache import ByteBoundedCache
from perl_megatron.data.image_reader import ImageReader, as_image
from perl_megatron.data.images import image_key, load_image
from perl_megatron.data.pixel_store import PixelStore

SIDE, BOUNDS = 512, (784, 262_144)
NUM_PROCESSES = (1, 2, 4)
CACHE_BYTES = 512 * 2**20
SHARED_MEMORY = Path("/dev/shm")
PATCHED = 30
"""Images whose patches are made, for the time of one."""


def make_images(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03d}.jpg", quality=90)


def pss_gib() -> float:
    """Memory of this process; its part of what it shares."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("no Pss in /proc/self/smaps_rollup")


def hold(kind: str, images: Path, store: Path) -> None:
    """One process of the node: reads all images, and says what that took; then what it holds."""
    take = take_shared(store) if kind == "shared" else take_alone()
    paths = sorted(images.iterdir())
    before, begin = pss_gib(), time.perf_counter()
    for path in paths:
        take(path)
    answer({"ms": 1000 * (time.perf_counter() - begin) / len(paths)})
    sys.stdin.readline()  # until all processes have read
    answer({"gib": pss_gib() - before})
    sys.stdin.readline()


def answer(values: dict[str, float]) -> None:
    print(json.dumps(values), flush=True)


def take_shared(store: Path) -> Callable[[Path], object]:
    reader = ImageReader(PixelStore(store, CACHE_BYTES), *BOUNDS)
    return lambda path: as_image(reader.read(path).pixels)


def take_alone() -> Callable[[Path], object]:
    images: ByteBoundedCache[Image.Image] = ByteBoundedCache(CACHE_BYTES)
    patches: ByteBoundedCache[np.ndarray] = ByteBoundedCache(CACHE_BYTES)

    def take(path: Path) -> None:
        image = load_image(path, *BOUNDS)
        key, num_values = image_key(image), 3 * image.width * image.height
        images.put(key, image, num_bytes=num_values)
        patches.put(key, np.full(2 * num_values, 0.5, np.float32), num_bytes=8 * num_values)

    return take


def work_on_processes(kind: str, count: int, images: Path) -> dict[str, float]:
    """Memory of ``count`` processes, and the time that the first and the last one took for an image."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as store:
        command = [sys.executable, __file__, "--hold", kind, "--path", str(images), "--store", store]
        processes, reading = [], []
        for _ in range(count):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            reading.append(ask(process)["ms"])
        held = []
        for process in processes:
            held.append(ask(process, "\n")["gib"])
        shared = sum(path.lstat().st_size for path in Path(store).rglob("*") if path.is_file()) / 2**30
        for process in processes:
            process.communicate("\n")
    return {"gib": sum(held) + shared, "first_ms": reading[0], "last_ms": reading[-1]}


def ask(process: subprocess.Popen[str], question: str = "") -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question)
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def work_on_patches(kind: str) -> dict[str, float]:
    """CPU milliseconds for the patches of an image."""
    from perl_megatron.data.patches import Patches
    from perl_megatron.runtime import torchvision_schema

    torchvision_schema.install()  # transformers imports torchvision
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(size={"shortest_edge": BOUNDS[0], "longest_edge": BOUNDS[1]})

    def process(pixels: np.ndarray, **options: Any) -> np.ndarray:
        return processor(images=[as_image(pixels)], return_tensors="pt", **options)["pixel_values"].numpy()

    make = Patches(lambda pixels: process(pixels, do_resize=False)) if kind == "table" else process
    random, times = np.random.default_rng(0), []
    for _ in range(PATCHED):
        pixels = random.integers(0, 256, (504, 504, 3), dtype=np.uint8)
        begin = time.process_time()
        make(pixels)
        times.append(1000 * (time.process_time() - begin))
    return {"ms": statistics.median(times)}


def run(images: Path, rounds: int) -> list[Row]:
    names = [f"{kind}-{count}" for count in NUM_PROCESSES for kind in ("shared", "alone")]
    results = run_in_turn(
        Path(__file__), [*names, "table", "transformers"], ["--path", str(images)], rounds=rounds, threads=1
    )

    def values(name: str, key: str) -> list[float]:
        return [result[key] for result in results[name]]

    rows, peer = [], "each for itself"
    for count in NUM_PROCESSES:
        ours, theirs = f"shared-{count}", f"alone-{count}"
        memory, other_memory = values(ours, "gib"), values(theirs, "gib")
        rows.append(make_row(f"memory, processes: {count}", memory, peer, other_memory, "GiB", None))
    for key, case in (("first_ms", "an image, first process"), ("last_ms", "an image, second process")):
        rows.append(make_row(case, values("shared-2", key), peer, values("alone-2", key), "ms", None))
    made, processed = values("table", "ms"), values("transformers", "ms")
    rows.append(make_row("patches of an image, CPU time", made, "image processor", processed, "ms", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="20 images, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    for hidden in ("--worker", "--hold"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--path", "--store"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        hold(options.hold, options.path, options.store)
    elif options.worker:
        kind, _, count = options.worker.partition("-")
        result = work_on_processes(kind, int(count), options.path) if count else work_on_patches(kind)
        print(json.dumps(result))
    else:
        count, rounds = (20, 1) if options.quick else (200, options.rounds)
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder), count)
            report(f"{count} images of {SIDE} × {SIDE}", run(Path(folder), rounds), options.json)


if __name__ == "__main__":
    main()
