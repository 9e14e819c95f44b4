"""Every layout on 2 and on 4 processes against transformers, judged as `perl-megatron verify` judges it."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch_ranks import launch_ranks
from matrix_worker import LAYOUTS, matrix

from perl_megatron.verification.layout import Layout

WORKER = Path(__file__).with_name("matrix_worker.py")


CELLS = [(processes, index) for processes, layouts in LAYOUTS.items() for index in range(len(layouts))]
NAMES = [f"{LAYOUTS[processes][index]} on {processes}" for processes, index in CELLS]


@dataclass(frozen=True)
class Launch:
    """What became of the layouts of one number of processes."""

    folder: Path
    failure: str
    """Why the ranks ended early, with the end of their output; empty where they did not."""

    def report(self, index: int) -> dict[str, Any]:
        """The layout's; the test fails where the ranks did not come so far."""
        file = self.folder / f"{index}.json"
        if not file.exists():
            pytest.fail(self.failure or "the ranks left no report", pytrace=False)
        return json.loads(file.read_text())


@pytest.fixture(scope="module")
def launched(tmp_path_factory, request):
    """Processes → launch: one for each number of processes, as it costs ten seconds, also where it fails."""

    @functools.cache
    def launched(processes: int) -> Launch:
        cells = [item.callspec.params for item in request.session.items if getattr(item, "obj", None) is test_layout]
        chosen = [cell["index"] for cell in cells if cell["processes"] == processes]
        launches.append(launch(tmp_path_factory.mktemp(f"matrix-{processes}"), processes, chosen))
        return launches[-1]

    launches: list[Launch] = []
    yield launched
    # Also of ranks that failed after their last report.
    failures = [each.failure for each in launches if each.failure]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def launch(folder: Path, processes: int, chosen: Sequence[int]) -> Launch:
    numbers = ",".join(map(str, chosen))
    try:
        launch_ranks(WORKER, folder, numbers, log=folder / "ranks.log", processes=processes, timeout=1000)
    except pytest.fail.Exception as failure:
        return Launch(folder, str(failure))
    return Launch(folder, "")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "index"), CELLS, ids=NAMES)
def test_layout(launched, processes, index):
    report = launched(processes).report(index)
    failed = [(row["check"], row["worst"]) for row in report["rows"] if not row["passed"]]
    assert report["passed"], failed


def test_the_matrix_is_whole():
    assert len(matrix(2)) == 6
    assert len(matrix(4)) == 15
    assert Layout.of({"pipeline": 2, "virtual_pipeline": 2, "context": 2}) in matrix(4)
    assert len(NAMES) == len(set(NAMES))
