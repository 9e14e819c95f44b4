"""Write the digits task: `python tools/make_digits.py OUT [--recipe FILE] [--seed 0] [--position-bias 0.8 …]`.

OUT gets the scans (`train/`, `heldout/`) and four files over them: `train.jsonl` (questions for training),
`perception.jsonl` and `warm_start.jsonl` (questions with right and with biased demonstrations) and `heldout.jsonl`
(balanced questions over scans that the others never show). A recipe is YAML: for each of these files the fields of
`perl_megatron.data.digits.DigitsOptions`; what it leaves out has the defaults below, and a flag beats the recipe. The
same arguments give the same files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from perl_megatron.data.digits import KINDS, DigitsOptions, make_records
from perl_megatron.data.mnist import write_scans
from perl_megatron.data.records import write_records
from perl_megatron.errors import UserError

DEFAULTS: dict[str, dict[str, Any]] = {
    "train": {"num_records": 4000},
    "perception": {"num_records": 4000, "demonstration_bias": 0.0},
    "warm_start": {"num_records": 4000, "demonstration_bias": 0.6},
    "heldout": {"num_records": 300},
}
FIXED = {
    "train": {"split": "train", "name": ""},
    "perception": {"split": "train", "name": "right"},
    "warm_start": {"split": "train", "name": "warm"},
    "heldout": {"split": "heldout", "name": ""},
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--recipe", type=Path, help="YAML file with the options of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, help="records in train.jsonl")
    parser.add_argument(
        "--num-warm-start",
        type=int,
        help="records in perception.jsonl (right demonstrations) and in warm_start.jsonl (biased ones)",
    )
    parser.add_argument("--num-heldout", type=int, help="records in heldout.jsonl")
    parser.add_argument("--kinds", type=parse_kinds, help="for all files, such as 'lookup=2,find=1'")
    parser.add_argument("--min-images", type=int, help="for all files")
    parser.add_argument("--max-images", type=int, help="for all files")
    parser.add_argument("--position-bias", type=float, help="share of train.jsonl that asks for the first image")
    parser.add_argument(
        "--demonstration-bias", type=float, help="share of demonstrations that answer for the first image"
    )
    return parser.parse_args(arguments)


def parse_kinds(text: str) -> dict[str, float]:
    """'lookup=2,find' as {'lookup': 2.0, 'find': 1.0}."""
    pairs = [part.partition("=") for part in text.split(",")]
    return {name.strip(): float(weight or 1) for name, _, weight in pairs}


def make_options(arguments: argparse.Namespace) -> dict[str, DigitsOptions]:
    """Defaults, then the recipe, then the flags."""
    recipe = read_recipe(arguments.recipe) if arguments.recipe else {}
    flags: dict[str, dict[str, Any]] = {
        "train": {"num_records": arguments.num_train, "position_bias": arguments.position_bias},
        "perception": {"num_records": arguments.num_warm_start},
        "warm_start": {"num_records": arguments.num_warm_start, "demonstration_bias": arguments.demonstration_bias},
        "heldout": {"num_records": arguments.num_heldout},
    }
    shared = {name: getattr(arguments, name) for name in ("kinds", "min_images", "max_images")}
    options = {}
    for file, defaults in DEFAULTS.items():
        given = {name: value for name, value in {**shared, **flags[file]}.items() if value is not None}
        options[file] = DigitsOptions(
            **{**defaults, **recipe.get(file, {}), **given, **FIXED[file], "seed": arguments.seed}
        )
    return options


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe: {error}", where=str(path)) from error
    allowed = {field.name for field in fields(DigitsOptions)} - {"seed", "split", "name"}
    if not isinstance(recipe, dict) or not all(isinstance(section, dict) for section in recipe.values()):
        raise UserError(
            "a recipe has a section of options for each file", where=str(path), fix=f"files: {list(DEFAULTS)}"
        )
    unknown = [file for file in recipe if file not in DEFAULTS]
    unknown += [f"{file}.{key}" for file in recipe for key in recipe[file] if key not in allowed]
    if unknown:
        raise UserError(f"unknown key '{unknown[0]}'", where=str(path), fix=f"keys: {', '.join(sorted(allowed))}")
    return recipe


def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    parsed = parse_arguments(arguments)
    try:
        options = make_options(parsed)
        scans = write_scans(parsed.out)
        for file, chosen in options.items():
            records = make_records(chosen, scans[chosen.split])
            write_records(parsed.out / f"{file}.jsonl", records)
            counts = Counter(record.kind for record in records)
            kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
            print(f"{parsed.out / file}.jsonl: {len(records)} records ({kinds})")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(map(len, scans.values()))} scans; {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
