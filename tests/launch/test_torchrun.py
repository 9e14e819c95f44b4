"""Each launch costs a few seconds of torchrun's imports, so each test here checks all of one ending."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from perl_megatron.config.load import load_config
from perl_megatron.errors import UserError
from perl_megatron.launch.ports import free_port, require_free_port
from perl_megatron.launch.torchrun import launch, needs_launch

DRIVER = Path(__file__).with_name("launch_driver.py")


def start(mode: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.getcwd()}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, str(DRIVER), mode, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def ready(folder: Path) -> bool:
    return all((folder / f"ready-{rank}").exists() and (folder / f"ready-{rank}").read_text() for rank in (0, 1))


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    """Until the launcher has written a line with ``text`` to its standard error; what came up to there is read."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it ended with {process.wait()} without saying: {text}")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in (*folder.glob("ready-*"), *folder.glob("child-*"))]


def test_the_first_failing_rank_is_what_one_reads_last(tmp_path):
    process = start("failure", tmp_path)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "rank 1 failed first:\nTraceback" in err
    assert err.splitlines()[-2] == "RuntimeError: broken in rank 1"
    assert not (tmp_path / "run").exists()
    logs = Path(err.splitlines()[-1].removeprefix("logs of all ranks: "))
    assert len(list(logs.rglob("stdout.log"))) == 2


def test_the_first_interrupt_lets_the_ranks_finish_their_step(tmp_path):
    process = start("stop", tmp_path)
    wait_for(lambda: ready(tmp_path))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert not any(alive(pid) for pid in pids(tmp_path))
    # Rank 0 is on the console; all ranks are in the run's folder, which rank 0 made.
    assert out == "rank 0 of 2 at 127.0.0.1\n"
    assert sorted(err.splitlines()) == ["stopping after this step; once more to end at once", "warning of rank 0"]
    logs = sorted((tmp_path / "run" / "logs").rglob("stdout.log"))
    assert [path.read_text() for path in logs] == [f"rank {rank} of 2 at 127.0.0.1\n" for rank in (0, 1)]
    assert not any(path.is_symlink() for path in (tmp_path / "run" / "logs").iterdir())
    assert list(tmp_path.glob("perl-megatron-logs-*")) == []


def test_the_second_interrupt_ends_everything_at_once(tmp_path):
    process = start("stubborn", tmp_path)
    wait_for(lambda: ready(tmp_path))
    time.sleep(1.5)  # so that the ranks' own children are known too
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "once more to end at once")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "ended at once" in err
    assert len(pids(tmp_path)) == 4
    assert [pid for pid in pids(tmp_path) if alive(pid)] == []


def test_what_every_process_is_told_lets_the_ranks_finish_their_step(tmp_path):
    """As a batch system does it: the launcher, torchrun and the ranks, twice."""
    process = start("stop", tmp_path)
    wait_for(lambda: ready(tmp_path))
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everyone) == 4
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        if number == signal.SIGTERM:
            wait_for_line(process, "stopping after this step (SIGTERM)")
        time.sleep(0.5)
    _, err = process.communicate(timeout=180)
    logs = "\n".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert process.returncode == 0, err + logs
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert "stopping" not in err  # but for the line that was read above


def test_a_file_can_tell_the_ranks_and_before_the_first_step_nothing_is_lost(tmp_path):
    process = start("early", tmp_path)
    wait_for(lambda: ready(tmp_path))
    (tmp_path / "stop file").touch()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 75, err
    assert "stopping after this step (SIGUSR1)" in err
    assert "stopped before the first step" in err
    assert [pid for pid in pids(tmp_path) if alive(pid)] == []


def test_a_rank_that_is_killed_in_its_last_save_is_named_and_the_run_can_be_queued_again(tmp_path):
    process = start("killed", tmp_path)
    wait_for(lambda: ready(tmp_path))
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 75, err
    assert "before the first step" not in err
    assert err.splitlines()[-3:-1] == [
        "rank 1 was killed by SIGKILL, after the run was told to stop (SIGUSR1)",
        f"newest checkpoint, from which --resume goes on: {tmp_path}/run/checkpoints/step-00000002",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    process = start("stop", tmp_path)
    wait_for(lambda: ready(tmp_path))
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)))


def test_needs_launch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    two = load_config(None, ["model.path=m", "parallel.tensor=2"]).config
    assert needs_launch(two)
    assert not needs_launch(load_config(None, ["model.path=m"]).config)
    monkeypatch.setenv("RANK", "0")
    assert not needs_launch(two)


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            launch([], num_processes=2, log_dir=tmp_path / "logs", master_port=port)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not a port"):
        require_free_port(70000)
    require_free_port(free_port())
