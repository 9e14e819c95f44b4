"""Convert a checkpoint: `python tools/convert_checkpoint.py SOURCE TARGET --to {hf,torch_dist} [--tp N --pp N …]`.

SOURCE is a Hugging Face folder, a megatron-core torch_dist folder, or a training checkpoint of this project, in any
layout; what it is, is found out. A training checkpoint has no config and tokenizer: `--companions` names the Hugging
Face folder that has. An interrupted conversion leaves `.TARGET.partial`, which `--resume` continues; TARGET itself
appears only when it is whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

# Large tensors come and go: without huge pages the kernel spends longer on clearing small ones than on copying.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from perl_megatron.checkpoint.convert import plan_conversion, render_plan
from perl_megatron.checkpoint.partial_folder import partial_path
from perl_megatron.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="folder to read")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--to", required=True, choices=("hf", "torch_dist"), help="format to write")
    parser.add_argument("--tp", type=int, default=1, help="cut for this tensor-parallel size; any loads it")
    parser.add_argument("--pp", type=int, default=1, help="cut for this pipeline-parallel size; any loads it")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: as they are)")
    parser.add_argument(
        "--companions", type=Path, metavar="FOLDER", help="config, tokenizer and so on (default: SOURCE)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written; reads no tensor")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    return parser.parse_args(arguments)


def what_is_left(target: Path) -> str:
    """Of an interrupted conversion."""
    partial = partial_path(target)
    if not partial.exists():
        return "nothing was finished, and nothing is left behind"
    return f"{partial} has what is finished; the same command with --resume goes on"


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    conversion = plan_conversion(
        options.source,
        options.target,
        to=options.to,
        tensor_size=options.tp,
        pipeline_size=options.pp,
        dtype=DTYPES.get(options.dtype),
        companions_from=options.companions,
    )
    if options.dry_run:
        for line in render_plan(conversion):
            print(line)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=conversion.nbytes)
        conversion.run(resume=options.resume, progress=lambda nbytes: bar.advance(task, nbytes))
    print(f"{options.target}: {len(conversion.infos)} tensors, {conversion.nbytes:,} bytes")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted: {what_is_left(parse(sys.argv[1:]).target)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
