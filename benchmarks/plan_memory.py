"""Memory as `perl-megatron plan` has it, and as it is: `python benchmarks/plan_memory.py [--quick] [--json FILE]`.

A process builds the actor (policy, gradient buffers, optimizer) and makes two updates on a batch of questions with
images, on the CPU in float32. Compared are

- growth: peak resident memory less that of the process when everything is imported and the process group stands,
  against the plan without the process;
- whole: peak resident memory, against the plan with what it assumes for a process.

The plan is given the micro-batches that the actor makes of the batch, not the largest ones that the config allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import make_row, report, resident_gib, run_in_turn

BOUND = 0.15
RESPONSES = 3
"""To each prompt."""
CASES = ("tiny", "3B layers")
WORKER = "measured"


def make_config(folder: Path, recompute: str) -> Any:
    """The case's: no reference policy, the micro-batches of about two questions."""
    from perl_megatron.config.load import load_config

    settings = ("model.dtype=float32", "rollout.engine=embedded", "algorithm.kl_coefficient=0")
    return load_config(None, [f"model.path={folder}", f"model.recompute={recompute}", *settings]).config


def measure(name: str, folder: Path, recompute: str) -> dict[str, Any]:
    """Peaks of this process in GiB, and the plan's for the same micro-batches."""
    from perl_megatron.runtime import platform

    platform.install()
    import numpy as np
    from actor_cases import CASES as ACTOR_CASES
    from actor_cases import make_inputs

    from perl_megatron import jobs  # noqa: F401 - all that a job imports
    from perl_megatron.batching.cost import CostModel
    from perl_megatron.batching.work import views_of
    from perl_megatron.runtime import topology
    from perl_megatron.train.actor import Actor

    config = make_config(folder, recompute)
    place = topology.initialize(config.parallel, seed=0, timeout_seconds=600)
    inputs: Any = make_inputs(ACTOR_CASES[name])
    object.__setattr__(inputs, "banned_token_ids", ())
    random = np.random.default_rng(2)
    sequences = [
        replace(
            one,
            response=random.integers(10, 700, len(one.response)),
            logprob_old=np.full(len(one.response), -6.0, dtype=np.float32),
            advantage=float(random.standard_normal()),
        )
        for one in inputs.sequences
        for _ in range(RESPONSES)
    ]
    views = views_of([one.prompt for one in sequences], [len(one.response) for one in sequences])
    before = resident_gib("VmRSS")
    cost = CostModel(_numbers(folder), config.actor.sharing)
    half = cost.memory(views[: len(views) // 2])
    config = config.model_copy(update={"actor": config.actor.model_copy(update={"micro_batch_tokens": half})})
    actor = Actor(config, place, inputs, total_steps=2)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    for _ in range(2):
        actor.update(sequences)
    peak = resident_gib("VmHWM")
    plan = actor._schedule._layout.plan(sequences)
    micro_batches = [
        views_of([sequences[index].prompt for index in part], [len(sequences[index].response) for index in part])
        for part in plan
    ]
    return planned(config, folder, micro_batches) | {"before": before, "growth": peak - before, "whole": peak}


def _numbers(folder: Path) -> Any:
    from perl_megatron.config.architecture import read_architecture_numbers

    return read_architecture_numbers(folder)


def planned(config: Any, folder: Path, micro_batches: list[list[Any]]) -> dict[str, Any]:
    """The plan of an update of these micro-batches in one process, in GiB."""
    from perl_megatron.batching.cost import CostModel
    from perl_megatron.config.derive import derive
    from perl_megatron.plan.assumptions import Assumptions
    from perl_megatron.plan.engine import EngineShare
    from perl_megatron.plan.gpus import GIB
    from perl_megatron.plan.memory import stage_memory
    from perl_megatron.plan.workload import size_of

    numbers, assumptions = _numbers(folder), Assumptions()
    memory = stage_memory(
        config,
        derive(config, world_size=1, architecture=numbers, command="sft"),
        numbers,
        0,
        [size_of(views, CostModel(numbers, config.actor.sharing)) for views in micro_batches],
        micro_batches=len(micro_batches),
        modules="torch",
        process=GIB * assumptions.cpu_workspace_gib,
        engine=EngineShare(),
        fragmentation=0.0,
    )
    growth = memory.phases["update"] / GIB
    return {
        "planned_growth": growth,
        "planned_whole": growth + assumptions.cpu_process_gib,
        "parts": {name: value / GIB for name, value in memory.as_json().items() if isinstance(value, float)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the tiny case only")
    parser.add_argument("--rounds", type=int, default=1, help="fresh processes of each case")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.case, options.folder, options.recompute)))
        return
    from perl_megatron.runtime import platform

    platform.install()
    from actor_cases import CASES as ACTOR_CASES
    from actor_cases import write_case

    rows, worst = [], 0.0
    for name in CASES[:1] if options.quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_case(ACTOR_CASES[name], Path(folder))
            for recompute in ("none", "full"):
                arguments = ["--case", name, "--folder", folder, "--recompute", recompute]
                results = run_in_turn(
                    Path(__file__), [WORKER], arguments, rounds=options.rounds, threads=options.threads
                )[WORKER]
                for key in ("growth", "whole"):
                    plan, real = ([one[field] for one in results] for field in (f"planned_{key}", key))
                    rows.append(make_row(f"{name}, recompute {recompute}: {key}", plan, "measured", real, "GiB", None))
                    if key == "whole" or name != "tiny":
                        worst = max(worst, abs(rows[-1].ratio - 1))
    report(f"planned and measured memory, {options.threads} threads", rows, options.json)
    if worst > BOUND:
        sys.exit(f"the plan is off by {worst:.0%}, more than {BOUND:.0%}")


if __name__ == "__main__":
    main()
