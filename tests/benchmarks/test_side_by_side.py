"""Rows, turns and failures of the benchmarks' common part, and each benchmark from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perl_megatron.rollout.engine import vllm_obstacle

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from side_by_side import make_row, report, run_in_turn  # noqa: E402

VLLM = vllm_obstacle(cuda=False)
needs_vllm = pytest.mark.skipif(VLLM is not None, reason=str(VLLM))


def test_a_row_compares_medians():
    row = make_row("case", [4.0, 1.0, 2.0], "peer", [4.0, 4.0, 5.0], "s", goal=0.5)
    assert (row.ours, row.peer_value, row.ratio) == (2.0, 4.0, 0.5)
    assert row.spread == (1.5, 0.25)
    assert row.holds
    assert make_row("case", [2.1], "peer", [4.0], "s", goal=0.5).holds is False
    assert make_row("case", [2.1], "peer", [4.0], "s", goal=None).holds is None


def test_the_json_has_the_rows_of_the_table(tmp_path, capsys):
    report("title", [make_row("a case", [3.0], "peer", [2.0], "s", goal=1.0)], tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["ratio"] == 1.5
    assert row["holds"] is False
    printed = capsys.readouterr().out
    assert "a case" in printed
    assert "NO" in printed


WORKER = """
import json, os, sys
name, log = sys.argv[2], sys.argv[3]
if name == "bad":
    sys.exit("what went wrong")
open(log, "a").write(name + " ")
print("noise")
print(json.dumps({"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}))
"""


def test_workers_take_turns_in_fresh_processes(tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(WORKER)
    results = run_in_turn(script, ["ours", "peer"], [str(log)], rounds=3, threads=1)
    assert log.read_text().split() == ["ours", "peer", "peer", "ours", "ours", "peer"]
    everybody = [*results["ours"], *results["peer"]]
    assert {each["threads"] for each in everybody} == {"1"}
    assert len({each["pid"] for each in everybody}) == 6


def test_a_failing_worker_ends_the_benchmark_with_its_message(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    with pytest.raises(SystemExit, match="worker bad failed:\nwhat went wrong"):
        run_in_turn(script, ["bad"], [str(tmp_path / "log")], rounds=1, threads=1)


@pytest.mark.slow
def test_the_actor_benchmark_compares_equal_work(tmp_path):
    """It ends with an error where losses or gradients differ; the ratio itself depends on the machine."""
    command = [sys.executable, str(BENCHMARKS / "actor.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in rows] == [
        "tiny: forward + backward",
        "tiny: processor time",
        "tiny: of which matrix products (profile)",
        "tiny: of which attention (profile)",
        "tiny: of which the rest (profile)",
        "tiny: peak memory",
    ]
    assert all(row["ours"] > 0 and row["peer_value"] > 0 for row in rows)


@pytest.mark.slow
def test_the_conversion_benchmark_goes_there_and_back(tmp_path):
    """It ends with an error where a bit is lost, or where mbridge maps a tensor to other numbers."""
    script, rows_file = str(BENCHMARKS / "convert.py"), tmp_path / "rows.json"
    command = [sys.executable, script, "--quick", "--folder", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(rows_file)], capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    assert "equal: " in run.stdout
    cases = {(row["case"], row["peer"]): row["ours"] for row in json.loads(rows_file.read_text())}
    assert {peer for _, peer in cases} == {"cp", "cp + sync", "3 GB", "mbridge"}
    assert len(cases) == 7
    assert all(value > 0 for value in cases.values())


@pytest.mark.slow
def test_the_loss_benchmark_compares_with_each_peer_that_is_installed(tmp_path):
    """It ends with an error where a peer computes another loss or another gradient."""
    script, rows_file = str(BENCHMARKS / "loss.py"), tmp_path / "rows.json"
    command = [sys.executable, script, "--quick", "--json", str(rows_file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(rows_file.read_text())
    times = {row["peer"] for row in rows if row["unit"] == "s"}
    assert times >= {"matrix products", "naive", "Liger", "TRL"}  # cut-cross-entropy needs triton
    assert {row["peer"] for row in rows if row["unit"] == "GiB"} == times - {"matrix products"} | {"100 MB"}
    assert all(row["ours"] > 0 and row["peer_value"] > 0 for row in rows if row["unit"] == "s")


def quick_rows(name, tmp_path):
    """(rows, output) of a benchmark's quick case."""
    command = [sys.executable, str(BENCHMARKS / name), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads((tmp_path / "rows.json").read_text()), run.stdout


@pytest.mark.slow
def test_the_pixels_benchmark_counts_the_memory_of_all_processes(tmp_path):
    rows, _ = quick_rows("pixels.py", tmp_path)
    memory = [row for row in rows if row["unit"] == "GiB"]
    assert [row["case"] for row in memory] == [f"memory, processes: {count}" for count in (1, 2, 4)]
    for row, count in zip(memory, (1, 2, 4), strict=True):
        assert row["ours"] == pytest.approx(memory[0]["ours"], rel=0.3)
        assert row["peer_value"] == pytest.approx(count * memory[0]["peer_value"], rel=0.3)
    assert all(row["ours"] > 0 for row in rows)


@needs_vllm
@pytest.mark.slow
def test_the_update_benchmark_takes_updates_apart(tmp_path):
    rows, _ = quick_rows("sync.py", tmp_path)
    assert [row["peer"] for row in rows] == ["memory copy", "memory copy", "update"] * 2 + ["few layers"]
    assert all(row["ours"] > 0 and row["peer_value"] > 0 for row in rows)
    assert [row["case"].split(":")[0] for row in rows[::3]][:2] == ["2 layers, 1 MB", "6 layers, 2 MB"]


@needs_vllm
@pytest.mark.slow
def test_the_rollout_benchmark_samples_the_same_on_both_sides(tmp_path):
    """It ends with an error where one side samples more."""
    rows, output = quick_rows("rollout.py", tmp_path)
    assert [(row["case"], row["peer"]) for row in rows] == [("1000 tokens", "bare vLLM")]
    assert rows[0]["ours"] > 0
    assert "'rollout/image_hit_rate': 0.9" in output
