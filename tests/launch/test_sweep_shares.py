"""How the workers of a sweep share a machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from perl_megatron.errors import UserError
from perl_megatron.launch.sweep_workers import divide, run_workers, visible_devices


def test_cores_and_devices_are_divided() -> None:
    shares = divide(range(8), [str(index) for index in range(8)], workers=3, processes=2)
    assert [share.devices for share in shares] == [("0", "1"), ("2", "3"), ("4", "5")]
    assert sorted(core for share in shares for core in share.cores) == list(range(8))
    assert {share.devices for share in divide(range(2), None, workers=3, processes=1)} == {None}
    assert all(share.cores for share in divide(range(2), None, workers=3, processes=1))
    with pytest.raises(UserError, match="need 10 GPUs, and there are 8") as error:
        divide(range(8), [str(index) for index in range(8)], workers=5, processes=2)
    assert "at most 4 workers" in str(error.value.fix)


def test_each_worker_sees_its_own_share(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert visible_devices() == ["4", "5", "6"]
    program = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], *os.sched_getaffinity(0)); sys.exit(3)"
    assert run_workers([sys.executable, "-c", program], workers=2, processes=1) == [3, 3]
    lines = sorted(capfd.readouterr().out.splitlines())
    assert [line.split()[0] for line in lines] == ["4", "5"]
    cores = [set(line.split()[1:]) for line in lines]
    assert len(os.sched_getaffinity(0)) < 2 or not cores[0] & cores[1]


def test_a_signal_reaches_every_worker_once() -> None:
    program = (
        "import signal, sys, time, os\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "print('ready', flush=True)\n"
        "while not got: time.sleep(0.05)\n"
        "time.sleep(0.5); sys.exit(70 + len(got))\n"
    )
    parent = (
        "import sys\nfrom perl_megatron.launch.sweep_workers import run_workers\n"
        f"print(run_workers([sys.executable, '-c', {program!r}], workers=2, processes=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert output == "[71, 71]\n"
