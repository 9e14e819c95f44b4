"""Stands for `perl-megatron train`: measures a function of its settings, step by step, and can be resumed.

`fake_run.py OUTCOMES train CONFIG [--resume] SETTING…`. It notes every step that it makes in the file `steps` of its
run's folder, with its process id, so that a step that is made twice, or by two at a time, can be seen. While there
is a file `hold` in OUTCOMES it stays after its second step, until it is told to stop.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 6
SECONDS_A_STEP = 0.1


def main() -> int:
    arguments = sys.argv[3:]
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    folder = Path(settings["run.directory"]) / settings["run.name"]
    rate, seed = float(settings["optimizer.learning_rate"]), int(settings["run.seed"])
    if settings.get("algorithm.ratio") == '"sequence"':
        print("error: this point cannot be run")
        return 2
    checkpoints = folder / "checkpoints"
    done = max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)
    assert bool(done) == ("--resume" in arguments)
    checkpoints.mkdir(parents=True, exist_ok=True)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    rows = [json.loads(line) for line in read(folder / "metrics.jsonl") if json.loads(line)["step"] <= done]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    crash = Path(sys.argv[1]) / f"{folder.parent.name}-crash"
    hold = Path(sys.argv[1]) / "hold"
    while done < STEPS and not stopped:
        time.sleep(SECONDS_A_STEP)
        done += 1
        value = done / STEPS - 0.1 * abs(math.log10(rate) + 4) + 0.01 * seed
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": done, "evaluation/accuracy": value, "reward/mean": 2 * value}) + "\n")
        with (folder / "steps").open("a") as file:
            file.write(f"{done} {os.getpid()}\n")
        (checkpoints / f"step-{done:08d}").mkdir()
        while done == 2 and hold.exists() and not stopped:
            time.sleep(0.02)
        if crash.exists() and done == 3:
            crash.unlink()
            return 1
    if done < STEPS:
        return 75
    (folder / "summary.json").write_text("{}")
    return 0


def read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
