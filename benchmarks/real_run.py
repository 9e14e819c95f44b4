"""A real run of `perl-megatron train` at the demo's settings, for benchmarks that compare such runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def metrics_of_run(settings: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` of a run with these overrides, whose own folder below ``folder`` is deleted then."""
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        place = (f"run.directory={runs}", "run.name=run")
        command = [sys.executable, "-m", "perl_megatron", "train", "examples/demo/train.yaml", *place, *settings]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(run.stdout[-2000:] + run.stderr[-5000:])
        return [json.loads(line) for line in (Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()]
