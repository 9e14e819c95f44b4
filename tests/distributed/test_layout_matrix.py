"""Every layout on 2 and on 4 processes against transformers, judged as `perl-megatron verify` judges it."""

import functools
import json
from pathlib import Path

import pytest
from launch_ranks import launch_ranks
from matrix_worker import LAYOUTS, matrix

from perl_megatron.verification.layout import Layout

WORKER = Path(__file__).with_name("matrix_worker.py")


@pytest.fixture(scope="module")
def reports_of(tmp_path_factory):
    """Processes → {layout: report}; one launch for each number of processes, as a launch costs ten seconds."""

    @functools.cache
    def reports_of(processes: int) -> dict[str, dict]:
        return launch(tmp_path_factory.mktemp(f"matrix-{processes}"), processes)

    return reports_of


def launch(folder: Path, processes: int) -> dict[str, dict]:
    launch_ranks(WORKER, folder, log=folder / "ranks.log", processes=processes, timeout=550)
    return json.loads((folder / "reports.json").read_text())


CELLS = [(processes, str(layout)) for processes, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), CELLS, ids=[f"{layout} on {number}" for number, layout in CELLS])
def test_layout(reports_of, processes, layout):
    report = reports_of(processes)[layout]
    failed = [(row["check"], row["worst"]) for row in report["rows"] if not row["passed"]]
    assert report["passed"], failed


def test_the_matrix_is_whole():
    assert len(matrix(2)) == 6
    assert len(matrix(4)) == 15
    assert Layout.of({"pipeline": 2, "virtual_pipeline": 2, "context": 2}) in matrix(4)
    assert len(CELLS) == len(set(CELLS))
