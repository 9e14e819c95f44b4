import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from pool_functions import note_and_square, work

from perl_megatron.data.worker_pool import WorkerDied, WorkerPool
from perl_megatron.errors import UserError

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(work, 2) as pool:
        yield pool


def test_results_come_in_order(pool):
    assert [future.result() for future in pool.in_order(range(50))] == [number**2 for number in range(50)]
    assert len({future.result() for future in pool.in_order(["process"] * 50)}) <= 2


def test_workers_do_not_import_torch_nor_the_main_module(pool):
    assert pool.submit("modules").result() == []


def test_errors_come_back_as_they_are(pool):
    with pytest.raises(UserError, match="it is refused") as refusal:
        pool.submit("refuse").result()
    assert (refusal.value.where, refusal.value.fix) == ("here", "nothing")
    assert not isinstance(refusal.value, WorkerDied)
    with pytest.raises(RuntimeError, match="a bug"):
        pool.submit("fail").result()


def test_a_worker_that_dies_costs_the_one_item_it_had(pool):
    futures = list(pool.in_order([1, "die", 2, "die", "die", 3]))
    assert [future.exception() is None for future in futures] == [True, False, True, False, False, True]
    with pytest.raises(WorkerDied, match="died"):
        futures[1].result()
    assert futures[5].result() == 9


def test_a_worker_that_hangs_is_replaced():
    with WorkerPool(work, 1, item_seconds=0.2) as pool:
        hung, next_one = pool.submit("hang"), pool.submit(4)
        with pytest.raises(WorkerDied, match=r"more than 0\.2 s"):
            hung.result()
        assert next_one.result() == 16


def test_no_more_items_are_taken_than_may_be_ahead(tmp_path):
    with WorkerPool(note_and_square, 1) as pool:
        results = pool.in_order(((str(tmp_path), number) for number in range(100)), ahead=3)
        next(results)
        pool.submit((str(tmp_path), 1000)).result()  # behind all that were taken
        assert {int(name) for name in os.listdir(tmp_path)} == {0, 1, 2, 3, 1000}


def test_what_cannot_start_is_no_fault_of_the_item(monkeypatch, capfd):
    module = ModuleType("only_in_the_test")
    exec("def function(item): return item", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_in_the_test", module)
    with WorkerPool(module.function, 1) as pool, pytest.raises(RuntimeError, match="before it was ready") as failure:
        pool.submit(1).result()
    assert not isinstance(failure.value, UserError)
    assert "No module named 'only_in_the_test'" in capfd.readouterr().err


@pytest.mark.parametrize("call", [(subprocess, "Popen"), (socket, "socketpair")])
def test_where_no_process_can_be_started_each_item_says_so_until_one_can(monkeypatch, call):
    def fail(*arguments, **keys):
        raise OSError(12, "Cannot allocate memory")

    with WorkerPool(work, 1) as pool:
        with monkeypatch.context() as without:
            without.setattr(*call, fail)
            for item in (1, 2):
                with pytest.raises(RuntimeError, match=r"could not be started.*Cannot allocate memory"):
                    pool.submit(item).result(timeout=60)
        assert pool.submit(3).result(timeout=60) == 9


def test_closing_cancels_what_waits():
    pool = WorkerPool(work, 1, item_seconds=1)
    futures = [pool.submit(item) for item in ["hang", 2, 3]]
    while not futures[0].running():
        time.sleep(0.01)
    pool.close()
    assert futures[1].cancelled()
    assert isinstance(futures[0].exception(), WorkerDied)


def test_workers_end_with_their_parent():
    program = (
        "import os, signal\n"
        "from perl_megatron.data.worker_pool import WorkerPool\n"
        "from pool_functions import work\n"
        "print(WorkerPool(work, 1).submit('process').result(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE, check=False)
    worker = int(ended.stdout)
    deadline = time.monotonic() + 30
    while _is_alive(worker):
        assert time.monotonic() < deadline, f"worker {worker} is still there"
        time.sleep(0.05)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
