"""Runs `launch` on a small script of ranks, in its own process: `python launch_driver.py MODE FOLDER`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from perl_megatron.launch.failures import DIRECTORY_VARIABLE, record_failure
from perl_megatron.launch.torchrun import launch, launcher_pid
from perl_megatron.runtime.signals import StopRequest


def say(folder: Path, name: str) -> None:
    (folder / f"{name}-{os.environ['RANK']}").write_text(str(os.getpid()))


def rank(mode: str, folder: Path) -> None:
    number = os.environ["RANK"]
    print(f"rank {number} of {os.environ['WORLD_SIZE']} at {os.environ['MASTER_ADDR']}", flush=True)
    print(f"warning of rank {number}", file=sys.stderr, flush=True)
    if mode == "failure":
        first = Path(os.environ[DIRECTORY_VARIABLE]) / "rank-1.json"
        while number == "0" and not first.exists():
            time.sleep(0.01)
        raise RuntimeError(f"broken in rank {number}")
    if mode == "stop":
        assert launcher_pid() == int((folder / "launcher").read_text())
        (folder / "run").mkdir(exist_ok=True)
        with StopRequest(last=True) as stop:
            say(folder, "ready")
            while not stop.requested():
                time.sleep(0.05)
            time.sleep(1.5)  # the rest of the step
            say(folder, "stopped")
    elif mode == "killed":
        checkpoint = folder / "run" / "checkpoints" / "step-00000002"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.json").touch()
        with StopRequest(last=True) as stop:
            say(folder, "ready")
            while not stop.requested():
                time.sleep(0.05)
            if number == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1.5)  # what it waits for is gone
            raise ConnectionError("connection closed by peer")
    elif mode == "early":
        say(folder, "ready")
        time.sleep(600)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (folder / f"child-{number}").write_text(str(child.pid))
        say(folder, "ready")
        time.sleep(600)


def main() -> int:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if "RANK" in os.environ:
        try:
            rank(mode, folder)
        except Exception as error:
            record_failure(error)
            return 1
        return 0
    (folder / "launcher").write_text(str(os.getpid()))
    stop_file = folder / "stop file"
    return launch(
        sys.argv[1:], num_processes=2, log_dir=folder / "run" / "logs", program=[__file__], stop_file=stop_file
    )


if __name__ == "__main__":
    sys.exit(main())
