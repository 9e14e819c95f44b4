#!/usr/bin/env python3
"""Stands in for the Python of a Slurm job: notes how it is called, and behaves as a trainer or a server would."""

import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = sys.argv[1:]
assert arguments[:2] == ["-m", "perl_megatron"], arguments
command = arguments[2]
notes = Path(os.environ["NOTES"])
names = ("SLURM_NODEID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "SAID")
note = {"arguments": arguments[2:], **{name: os.environ.get(name) for name in names}}


def write(name: str, content: object) -> None:
    file = notes / f"{command}-{os.environ['SLURMD_NODENAME']}-{name}.json"
    file.with_suffix(".part").write_text(json.dumps(content))
    file.with_suffix(".part").rename(file)


if command == "serve":
    port = arguments[arguments.index("--port") + 1]

    def end(number: int, frame: object) -> None:
        write(f"{port}-ended", number)
        sys.exit(0)

    assert "--ignore-sigterm" in arguments
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, end)
    write(port, note)
    time.sleep(600)
restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
write(restarts, note)
if restarts == "0":
    run, stop = Path(os.environ["RUN"]), Path(arguments[arguments.index("--stop-file") + 1])
    if "FOLDER" in os.environ:
        run.mkdir(exist_ok=True)  # each node's stand-in makes it
        (run / "config.yaml").touch()
    until = time.monotonic() + 120
    while not stop.exists() and time.monotonic() < until:
        if "FAIL" in os.environ and list(notes.glob("serve-*.json")):
            break
        time.sleep(0.1)
    if "FAIL" in os.environ:
        sys.exit(1)
    write("stopped", stop.exists())
    sys.exit(75)
