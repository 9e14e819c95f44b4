"""How long a step waits for its images: `python benchmarks/data_idle.py [--quick] [--rounds N] [--json FILE]`.

Real runs of `perl-megatron train` by the embedded engine on a tiny policy, with one thread: questions of four JPEG
images of 640 × 480 with the grain of photographs, none of which is drawn twice, reduced to at most 262,144 pixels as in
the paper. Images are decoded ahead by 2, 1 or no processes; the floor has all of them in memory before the run
(`data.check=load`). Idle seconds are data/idle_share × seconds/step; the first step (nothing had been decoded) and the
second (prepared by a first step that is slower than others) are left out.

The last rows compare what a process takes for an image (measured: its processor time) with the time that a step of the
shipped GPU configs leaves for each of its images (calculated by `perl-megatron plan`, not measured on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from real_run import REPOSITORY, metrics_of_run
from side_by_side import Row, make_row, report, run_in_turn

from perl_megatron.data.image_reader import ImageReader
from perl_megatron.data.images import smart_resize
from perl_megatron.data.node_folder import own_pixels
from perl_megatron.data.patches import PATCH_SIZE
from perl_megatron.data.records import write_records
from perl_megatron.data_idle import MAX_SHARE
from perl_megatron.types import PermutationContract, Record, ReferenceRule

IMAGES, SIDES, MAX_PIXELS = 4, (640, 480), 262_144
QUESTIONS = 2
"""Of a step."""
WARM_STEPS = 2
SETTINGS = {
    "2 processes": ("data.check=draw", "data.decode_processes=2"),
    "1 process": ("data.check=draw", "data.decode_processes=1"),
    "no process": ("data.check=draw", "data.decode_processes=0"),
    "in memory": ("data.check=load",),
}
SHIPPED = {"3b": "3b", "3b_one_gpu": "3b", "7b": "7b", "32b": "32b", "72b": "72b"}
"""Config of examples/qwen2_5_vl, and the folder of its model's shapes."""
QUICK = ("2 processes", "no process"), ("3b",)
"""Runs and configs of the quick case."""


def prepare(folder: Path, num_steps: int) -> None:
    """A tiny policy, and as many questions as the steps draw and look ahead to."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    records = []
    for number in range((num_steps + 1) * QUESTIONS):
        images = tuple(folder / "images" / f"{number}-{index}.jpg" for index in range(IMAGES))
        for image in images:
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(SIDES, Image.Resampling.BICUBIC), dtype=np.float32)
            grain = random.normal(0, 12, smooth.shape[:2])[..., None]
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(image, quality=90)
        text = "<image>" * IMAGES + "\nHow many people are in the second image?"
        contract = PermutationContract(tuple(range(IMAGES)), (ReferenceRule.ORDINAL,))
        records.append(Record(f"q{number}", images, text, "3", "number", contract=contract))
    write_records(folder / "train.jsonl", records)
    policy = [sys.executable, "tools/make_tiny_policy.py", str(folder / "policy"), "--init-std", "0.08"]
    subprocess.run(policy, cwd=REPOSITORY, check=True, capture_output=True)


def work(name: str, folder: Path, num_steps: int) -> dict[str, list[float]]:
    """One run; numbers of its steps."""
    settings = [
        *(f"run.steps={num_steps}", "run.save_every=0", "parallel.tensor=1"),
        *(f"model.path={folder / 'policy'}", f"data.train={folder / 'train.jsonl'}", "data.evaluation=null"),
        *(f"data.max_pixels={MAX_PIXELS}", "data.max_prompt_tokens=4096"),
        *("rollout.engine=embedded", f"rollout.questions_per_step={QUESTIONS}", "rollout.num_rollouts=2"),
        *("filter.no_signal=false", "algorithm.kl_coefficient=0", *SETTINGS[name]),
    ]
    rows = [row for row in metrics_of_run(settings, folder) if row["step"] > WARM_STEPS]
    return {
        "step": [row["seconds/step"] for row in rows],
        "share": [row["data/idle_share"] for row in rows],
        "idle": [row["data/idle_share"] * row["seconds/step"] for row in rows],
    }


def work_on_images(folder: Path) -> dict[str, float]:
    """Processor time of one process for an image: read, decoded, resized, shared."""
    reader = ImageReader(own_pixels(2**29), 784, MAX_PIXELS)
    paths = sorted((folder / "images").iterdir())
    reader.read(paths[0])
    begin = time.process_time()
    for path in paths[1:]:
        reader.read(path)
    return {"ms": 1000 * (time.process_time() - begin) / len(paths[1:])}


def plans(configs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Of each shipped config (images of a step, its seconds), both calculated."""
    height, width = smart_resize(SIDES[1], SIDES[0], min_pixels=784, max_pixels=MAX_PIXELS)
    patches = height * width // PATCH_SIZE**2
    found = {}
    for config in configs:
        paths = [f"examples/qwen2_5_vl/{config}.yaml", f"model.path=examples/qwen2_5_vl/{SHIPPED[config]}"]
        command = [sys.executable, "-m", "perl_megatron", "plan", *paths, "--gpu", "h100-80g", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        plan: dict[str, Any] = json.loads(run.stdout)
        of_question = sum(count for _, count in plan["workload"]["group"][0]["images"]) / patches
        found[config] = (plan["batch"]["questions_per_step"] * of_question, plan["step"]["total"])
    return found


def rows_of(found: dict[str, list[dict[str, Any]]], configs: Sequence[str]) -> list[Row]:
    def steps(name: str, key: str) -> Sequence[float]:
        return [value for run in found[name] for value in run[key]]

    rows = []
    for name in [name for name in found if name in SETTINGS and name != "no process"]:
        for key, what, unit in (("idle", "idle in a step", "s"), ("share", "idle share", "1"), ("step", "step", "s")):
            rows.append(
                make_row(f"{name}: {what}", steps(name, key), "no process", steps("no process", key), unit, None)
            )
        if name == "2 processes":
            rows.append(make_row(f"{name}: idle share", steps(name, "share"), "bound", [MAX_SHARE], "1", 1.0))
    decoded = [run["ms"] for run in found["images"]]
    for config, (num_images, seconds) in plans(configs).items():
        case = f"{config}: an image, of {num_images:.0f} in {seconds:.0f} s"
        rows.append(make_row(case, decoded, "a step's (calculated)", [1000 * seconds / num_images], "ms", 1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps; its numbers mean little")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", choices=[*SETTINGS, "images"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "images":
        print(json.dumps(work_on_images(options.folder)))
        return
    if options.worker:
        print(json.dumps(work(options.worker, options.folder, options.steps)))
        return
    num_steps, rounds = (WARM_STEPS + 1, 1) if options.quick else (options.steps, options.rounds)
    names, configs = QUICK if options.quick else (tuple(SETTINGS), tuple(SHIPPED))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), num_steps)
        arguments = ["--folder", folder, "--steps", str(num_steps)]
        found = run_in_turn(Path(__file__), [*names, "images"], arguments, rounds=rounds, threads=1)
    report(f"{QUESTIONS} questions of {IMAGES} images a step", rows_of(found, configs), options.json)


if __name__ == "__main__":
    main()
