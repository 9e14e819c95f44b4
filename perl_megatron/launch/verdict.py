"""A command whose processes reach a verdict, such as `verify` and `replay`.

torchrun takes every status but 0 for a crash, so the processes end with 0, and their verdict comes back in the file
that the first of them writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perl_megatron.launch import torchrun


def launch_for_verdict(argv: Sequence[str], *, num_processes: int, json_file: Path | None, key: str) -> int:
    """Start the processes of `perl-megatron ARGV…` with `--json`; 0 where ``key`` of what they write is true, else 1.

    Where they did not come that far, the exit status of ``torchrun.launch``. ``json_file`` is the user's own, if any.
    """
    with tempfile.TemporaryDirectory(prefix="perl-megatron-verdict-") as folder:
        file = json_file or Path(folder) / "verdict.json"
        status = torchrun.launch([*argv, "--json", str(file)], num_processes=num_processes)
        if status != 0:
            return status
        return 0 if json.loads(file.read_text(encoding="utf-8"))[key] else 1


def verdict_status(good: bool) -> int:
    """The exit status of one process of the command: 1 for a bad verdict where nobody else tells it."""
    return 0 if good or torchrun.launcher_pid() is not None else 1
