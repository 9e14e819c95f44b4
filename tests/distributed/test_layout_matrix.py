"""Every layout on 2 and on 4 processes against transformers, judged as `perl-megatron verify` judges it."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from matrix_worker import KERNEL, LAYOUTS, matrix

from perl_megatron.verification.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("matrix_worker.py")


@pytest.fixture(scope="module")
def reports_of(tmp_path_factory):
    """Processes → {layout: report}; one launch for each number of processes, as a launch costs ten seconds."""

    @functools.cache
    def reports_of(processes: int) -> dict[str, dict]:
        return launch(tmp_path_factory.mktemp(f"matrix-{processes}"), processes)

    return reports_of


def launch(folder: Path, processes: int) -> dict[str, dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder / "workers.log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [*command, str(WORKER), str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = job.wait(timeout=550)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)  # torchrun's workers too
    assert returncode == 0, log.read_text()[-4000:]
    return json.loads((folder / "reports.json").read_text())


CELLS = [(processes, str(layout)) for processes, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), CELLS, ids=[f"{layout} on {number}" for number, layout in CELLS])
def test_layout(reports_of, processes, layout):
    report = reports_of(processes)[layout]
    failed = [(row["check"], row["worst"]) for row in report["rows"] if not row["passed"]]
    assert report["passed"], failed


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAYOUTS)
def test_log_prob_kernel_over_ranks(reports_of, processes):
    assert reports_of(processes)[KERNEL]["value"] <= 1e-13
    assert reports_of(processes)[KERNEL]["gradient"] <= 1e-13


def test_the_matrix_is_whole():
    assert len(matrix(2)) == 6
    assert len(matrix(4)) == 15
    assert Layout.of({"pipeline": 2, "virtual_pipeline": 2, "context": 2}) in matrix(4)
    assert len(CELLS) == len(set(CELLS))
