"""Opening and drawing from 100,000 records of 4 images: `python benchmarks/data.py [--quick] [--json FILE]`.

The records lie over a store of JPEG images, as an import leaves them. Opening checks every record (schema, contract,
answer, ids) and is timed without Python's imports: for the first time, when two processes make the index, and again.
Peers read all lines into memory and check nothing: plain `json`, and Hugging Face `datasets`, where it is installed.
Memory is VmHWM, less what the process held after its imports. Drawing decodes and resizes the four images of each
question: by processes that work ahead, against the trainer's own process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from side_by_side import Row, make_row, report, resident_gib, run_in_turn

from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.image_store import ImageStore
from perl_megatron.data.images import load_image
from perl_megatron.data.images_ahead import ImagesAhead
from perl_megatron.data.node_folder import own_pixels
from perl_megatron.data.question_stream import DrawChecks, LookAhead, QuestionStream
from perl_megatron.data.record_files import RecordFiles, open_record_files
from perl_megatron.data.record_index import cache_file
from perl_megatron.data.records import write_records
from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.record_check import check_answer
from perl_megatron.types import AnswerRule, PermutationContract, Record, ReferenceRule

IMAGES, SIDES = 4, (640, 480)
MAX_PIXELS = 262_144
OPEN_GOAL_SECONDS, AGAIN_GOAL_SECONDS, MEMORY_GOAL_GIB = 10.0, 2.0, 0.25
QUESTIONS = 300
"""Drawn for the rate of decoding."""


def make_dataset(folder: Path, num_records: int, num_images: int) -> Path:
    """Records of three kinds, whose contracts have references, lettered options, and nothing."""
    random = np.random.default_rng(0)
    store, images = ImageStore(folder / "images"), []
    for _ in range(num_images):
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = folder / "picture.jpg"
        Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC).save(picture, quality=90)
        images.append(store.add(picture.read_bytes()))
    movable = tuple(range(IMAGES))
    shown, listed = "<image>" * IMAGES, "\n(A) Image 1\n(B) Image 2\n(C) Image 3\n(D) Image 4"
    kinds: list[tuple[str, str, str, PermutationContract]] = [
        ("How many people are in the second image?", "3", "number",
         PermutationContract(movable, (ReferenceRule.ORDINAL,))),
        ("Which of the images shows a dog?" + listed, "C", "choice",
         PermutationContract(movable, (ReferenceRule.INDEX,), AnswerRule.OPTION_LETTER, movable)),
        ("How many of the scenes are outdoors?", "2", "number", PermutationContract(movable)),
    ]  # fmt: skip
    records = []
    for number in range(num_records):
        text, answer, answer_type, contract = kinds[number % 3]
        chosen = tuple(images[index] for index in random.integers(0, num_images, IMAGES))
        records.append(Record(f"q{number}", chosen, f"{shown}\n{text}", answer, answer_type, contract=contract))
    write_records(folder / "records.jsonl", records)
    return folder / "records.jsonl"


def open_ours(path: Path) -> RecordFiles:
    return open_record_files([path], check=check_answer, num_processes=2, max_corrupt_fraction=0.0)


def read_json(path: Path) -> list[object]:
    with path.open("rb") as lines:
        return [json.loads(line) for line in lines]


def read_datasets(path: Path) -> object:
    import datasets

    with tempfile.TemporaryDirectory() as cache:  # as for the first time
        return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)


def cpu_seconds() -> float:
    """CPU time of this process and of those that it waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def work_on_opening(name: str, path: Path) -> dict[str, float]:
    """Open the file by ``name``."""
    if name == "first":
        cache_file(path).unlink(missing_ok=True)
    if name == "datasets":
        import datasets  # noqa: F401 - imports are not timed
    before, begin, begin_cpu = resident_gib("VmRSS"), time.perf_counter(), cpu_seconds()
    opened = {"json": read_json, "datasets": read_datasets}.get(name, open_ours)(path)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - begin_cpu
    memory = resident_gib("VmHWM") - before
    if isinstance(opened, RecordFiles):  # draws from all of the file need no more memory
        for index in ShuffledSampler(len(opened), 0).next(2000):
            assert len(opened[index].images) == IMAGES
        memory = resident_gib("VmHWM") - before
    return {"seconds": seconds, "cpu": cpu, "memory_gib": memory}


def work_on_drawing(num_processes: int, path: Path) -> dict[str, float]:
    """Draw ``QUESTIONS`` questions and take their pixels; 0 processes: this one decodes."""
    records = open_ours(path)
    reader = ImageReader(own_pixels(2**29), 784, MAX_PIXELS)
    ahead = ImagesAhead(reader, num_processes=max(1, num_processes), max_bytes=2**28)

    def expect(images: Iterable[Path]) -> None:
        if num_processes:
            ahead.expect(images)

    def problem_of(record: Record) -> str | None:
        for image in record.images:
            (ahead.read(image).pixels if num_processes else load_image(image, 784, MAX_PIXELS)).tobytes()
        return None

    checks, look_ahead = DrawChecks(problem_of, 0.0, ""), LookAhead(expect, 20)
    questions = QuestionStream(records, ShuffledSampler(len(records), 0), checks, look_ahead)
    questions.next(16)  # the processes start
    begin, own = time.perf_counter(), time.process_time()
    for _ in range(QUESTIONS // 20):
        questions.next(20)
    seconds, own_seconds = time.perf_counter() - begin, time.process_time() - own
    ahead.close()
    images = IMAGES * QUESTIONS
    return {"ms": 1000 * seconds / images, "own_ms": 1000 * own_seconds / images}


def run_opening(path: Path, rounds: int) -> list[Row]:
    peers = ["json", *(["datasets"] if importlib.util.find_spec("datasets") else [])]
    arguments = ["--path", str(path)]
    results = run_in_turn(Path(__file__), ["first", "again", *peers], arguments, rounds=rounds, threads=1)

    def values(name: str, key: str) -> list[float]:
        return [result[key] for result in results[name]]

    first, again = values("first", "seconds"), values("again", "seconds")
    memory = values("again", "memory_gib")
    rows = [
        make_row("open for the first time", first, "goal", [OPEN_GOAL_SECONDS] * rounds, "s", 1.0),
        make_row("open again", again, "goal", [AGAIN_GOAL_SECONDS] * rounds, "s", 1.0),
        make_row("memory, with 2,000 draws", memory, "goal", [MEMORY_GOAL_GIB] * rounds, "GiB", 1.0),
    ]
    for peer in peers:
        rows += [
            make_row("open for the first time", first, peer, values(peer, "seconds"), "s", None),
            make_row("CPU time of opening", values("first", "cpu"), peer, values(peer, "cpu"), "s", None),
            make_row("open again", again, peer, values(peer, "seconds"), "s", None),
            make_row("memory", memory, peer, values(peer, "memory_gib"), "GiB", None),
        ]
    return rows


def run_drawing(path: Path, rounds: int) -> list[Row]:
    arguments = ["--path", str(path)]
    results = run_in_turn(Path(__file__), ["0", "1", "2"], arguments, rounds=rounds, threads=1)
    rows = []
    for name in ("1", "2"):
        for key, what in (("ms", "an image drawn"), ("own_ms", "CPU time of the trainer for it")):
            ours, theirs = ([result[key] for result in results[number]] for number in (name, "0"))
            rows.append(make_row(f"{what}, {name} ahead", ours, "no process ahead", theirs, "ms", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="3,000 records, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        by_number = options.worker.isdigit()
        result = work_on_drawing(int(options.worker), options.path) if by_number else None
        print(json.dumps(result or work_on_opening(options.worker, options.path)))
        return
    num_records, num_images, rounds = (3000, 100, 1) if options.quick else (100_000, 4000, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        path = make_dataset(Path(folder), num_records, num_images)
        print(f"{path.stat().st_size / 2**20:.0f} MiB of records", file=sys.stderr)
        rows = [*run_opening(path, rounds), *run_drawing(path, rounds)]
    report(f"{num_records:,} records of {IMAGES} images", rows, options.json)


if __name__ == "__main__":
    main()
