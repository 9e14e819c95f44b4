"""Real vLLM servers on loopback for tests: `perl-megatron serve`, with workers that can be corrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import yaml

from perl_megatron.launch.ports import free_port

HERE = Path(__file__).resolve().parent
START_SECONDS = 500.0


class ServerProcess:
    """A server of a tiny policy that is started right away and not waited for.

    Args:
        folder: gets the config and the log.
        policy: the checkpoint that it starts with.
    """

    def __init__(self, folder: Path, policy: Path, *, tensor_parallel: int = 1, key_file: Path | None = None):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        rollout = {"max_response_tokens": 40, "max_concurrent_sequences": 16, "cpu_cache_gib": 0.25}
        rollout |= {"tensor_parallel": tensor_parallel, "api_key_file": str(key_file) if key_file else None}
        config = {
            "model": {"path": str(policy), "dtype": "float32"},
            "data": {"max_prompt_tokens": 152},
            "rollout": rollout,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self.log = folder / f"{self.port}.yaml", folder / f"{self.port}.log"
        self._config.write_text(yaml.safe_dump(config))
        self.start()

    def start(self) -> None:
        """Start it (again), on the same port and with the weights that it was first started with."""
        places = os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent, HERE)))
        arguments = [HERE / "corruptible_server.py", self._config, "--port", self.port, "--max-images", 4]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=os.environ | {"PYTHONPATH": places},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> ServerProcess:
        """Wait until it answers."""
        wait_for_server(self.address, lambda: self._process.poll() is None, self.log)
        return self

    def kill(self) -> None:
        """As a machine that loses power: nothing is said, nothing cleaned up."""
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """As a machine that hangs: connections are accepted, nothing is answered."""
        for process in self._tree():
            process.suspend()

    def thaw(self) -> None:
        """Go on where it was frozen."""
        for process in self._tree():
            process.resume()

    def end(self) -> list[psutil.Process]:
        """Tell it to end, as Ctrl-C or Slurm do; returns the processes that it leaves behind."""
        tree = self._tree()
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        _, alive = psutil.wait_procs(tree, timeout=10)
        return alive

    def _tree(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self._process.pid)
            return [found, *found.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def wait_for_server(address: str, is_alive: object = lambda: True, log: Path | None = None) -> None:
    """Until it answers, or the test fails with the end of its log."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and is_alive():  # type: ignore[operator]
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.3)
    raise AssertionError(f"the server {address} did not start\n{log.read_text()[-3000:] if log else ''}")
