"""The options of `perl-megatron results`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_results_options(parser: argparse.ArgumentParser) -> None:
    """Add them to the command's parser."""
    text = "RUNS/NAME.benchmarks, which `perl-megatron eval` wrote"
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    text = "of two folders also the difference on the questions that both have, with its interval"
    parser.add_argument("--difference", action="store_true", help=text)
