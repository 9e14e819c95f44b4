"""The tests' own launcher: no rank and no child of a rank is left, and a failure shows what the ranks said."""

import time

import psutil
import pytest
from launch_ranks import launch_ranks, running_ranks, warm_ranks
from warm_torchrun import can_fork

HANG = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
(folder / f"writing-{rank}").write_text(f"{os.getpid()} {child.pid}")
(folder / f"writing-{rank}").rename(folder / f"pids-{rank}")
time.sleep(600)
"""


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


STARTS = [running_ranks, pytest.param(warm_ranks, marks=pytest.mark.skipif(not can_fork(), reason="CUDA"))]


@pytest.mark.parametrize("start", STARTS)
def test_hanging_ranks_and_their_children_are_killed(tmp_path, start):
    worker = tmp_path / "worker.py"
    worker.write_text(HANG)
    with start(worker, tmp_path, log=tmp_path / "log") as job:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("pids-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(pid) for file in tmp_path.glob("pids-*") for pid in file.read_text().split()]
        assert all(map(alive, pids))
    deadline = time.monotonic() + 10
    while any(map(alive, [job.pid, *pids])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


RANK = """
import os, sys
import torch.distributed as dist
assert __name__ == "__main__" and sys.path[0] == os.path.dirname(sys.argv[0])
print("began with the libraries:", "megatron.core" in sys.modules)
dist.init_process_group("gloo")
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, (dist.get_rank(), os.environ["LOCAL_RANK"], os.environ["OMP_NUM_THREADS"], sys.argv[1]))
assert ranks == [(0, "0", "1", "a b"), (1, "1", "1", "a b")], ranks
dist.barrier()
sys.exit("the second rank's word" if dist.get_rank() == 1 else 0)
"""


@pytest.mark.parametrize("start", STARTS)
def test_torchrun_starts_the_ranks(tmp_path, start):
    worker = tmp_path / "worker.py"
    worker.write_text(RANK)
    with start(worker, "a b", log=tmp_path / "log") as job:
        status = job.wait(120)
    said = (tmp_path / "log").read_text()
    assert status == 1, said
    assert said.count(f"began with the libraries: {start is warm_ranks}") == 2, said
    assert "the second rank's word" in said


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('a word of the rank')", r"worker\.py ended with status 1\n.*a word of the rank"),
        ("import time; print('asleep', flush=True); time.sleep(60)", r"had not ended after 8 s\n.*asleep"),
    ],
)
def test_failures_show_the_end_of_the_output(tmp_path, program, said):
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    with pytest.raises(pytest.fail.Exception, match=f"(?s){said}"):
        launch_ranks(worker, log=tmp_path / "log", processes=1, timeout=8 if "asleep" in program else 60)
