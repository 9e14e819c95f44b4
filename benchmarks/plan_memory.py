"""Memory as `perl-megatron plan` has it, and as it is: `python benchmarks/plan_memory.py [--quick] [--json FILE]`.

A process builds the actor (policy, gradient buffers, optimizer) and makes two updates on a batch of questions with
images, on the CPU in float32. Compared are

- growth: peak resident memory less that of the process when everything is imported and the process group stands,
  against the plan without the process;
- whole: peak resident memory, against the plan with what it assumes for a process;
- checkpoint, resume: what copying the state for a checkpoint adds, and reading it back, against the plan's host memory.

For growth and whole the plan is given the micro-batches that the actor makes of the batch. For

- bounds: peak resident memory, against what `perl-megatron plan --gpu cpu` says of an update

it is not: it knows the bounds of the config (longest prompts and responses), in micro-batches as full as they may be.
The batch then has prompts of that length, of images but for a word, and two questions in a micro-batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import make_row, report, resident_gib, run_in_turn

BOUND = 0.15
RESPONSES = 3
"""To each prompt."""
CASES = ("tiny", "3B layers")
WORKER = "measured"


def make_config(folder: Path, recompute: str, inputs: Any) -> Any:
    """The case's: no reference policy, the engine elsewhere, and bounds that the batch keeps to."""
    from perl_megatron.config.load import load_config

    settings = {
        "model.path": folder,
        "model.recompute": recompute,
        "model.dtype": "float32",
        "algorithm.kl_coefficient": 0,
        "permutation.num_permuted": 0,
        "rollout.engine": "server",
        "rollout.servers": "[http://127.0.0.1:8000]",
        "rollout.num_rollouts": RESPONSES,
        "rollout.questions_per_step": len(inputs.sequences),
        "rollout.max_response_tokens": max(len(one.response) for one in inputs.sequences),
        "data.max_prompt_tokens": max(len(one.prompt.token_ids) for one in inputs.sequences),
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()]).config


def measure(name: str, folder: Path, recompute: str, *, filled: bool) -> dict[str, Any]:
    """Peaks of this process in GiB, and the plan's: of the same micro-batches, or of the bounds (``filled``)."""
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

    case = ACTOR_CASES[name]
    if filled:
        case = replace(case, prompt_words=1, rows=max(4, case.rows))
    inputs: Any = make_inputs(case)
    config = make_config(folder, recompute, inputs)
    place = topology.initialize(config.parallel, seed=0, timeout_seconds=600)
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
    budget = cost.memory(views[: 2 if filled else len(views) // 2])
    config = config.model_copy(update={"actor": config.actor.model_copy(update={"micro_batch_tokens": budget})})
    actor = Actor(config, place, inputs, total_steps=2)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    for _ in range(2):
        actor.update(sequences)
    peak = resident_gib("VmHWM")
    measured = {"before": before, "growth": peak - before, "whole": peak, "bounds": peak}
    if filled:
        return planned_by_bounds(config, folder) | measured
    measured |= measure_checkpoint(actor)
    plan = actor._schedule._layout.plan(sequences)
    micro_batches = [
        views_of([sequences[index].prompt for index in part], [len(sequences[index].response) for index in part])
        for part in plan
    ]
    return planned(config, folder, micro_batches) | measured


def measure_checkpoint(actor: Any) -> dict[str, float]:
    """What a checkpoint adds at most while its state is copied, and while it is read, in GiB."""
    from perl_megatron.checkpoint.retention import Retention

    def added(work: Callable[[], Any]) -> tuple[float, Any]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident_gib("VmRSS")
        outcome = work()
        return resident_gib("VmHWM") - before, outcome

    with tempfile.TemporaryDirectory() as folder:
        copying, write = added(lambda: actor.prepare_save(Path(folder), 1, {}, Retention()))
        checkpoint = write()
        del write
        reading, _ = added(lambda: actor.restore(checkpoint))
    return {"checkpoint": copying, "resume": reading}


def _numbers(folder: Path) -> Any:
    from perl_megatron.config.architecture import read_architecture_numbers

    return read_architecture_numbers(folder)


def planned(config: Any, folder: Path, micro_batches: list[list[Any]]) -> dict[str, Any]:
    """The plan of an update of these micro-batches in one process, in GiB."""
    from perl_megatron.batching.cost import CostModel
    from perl_megatron.checkpoint.state_gather import PIECE_BYTES
    from perl_megatron.config.derive import derive
    from perl_megatron.plan.activations import SINGLE
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
        host_process=0.0,
        engine=EngineShare(),
        fragmentation=0.0,
    )
    growth = memory.phases["update"] / GIB
    return {
        "planned_growth": growth,
        "planned_whole": growth + assumptions.cpu_process_gib,
        # The pieces that a device would hold are in this process.
        "planned_checkpoint": (memory.host.checkpoint + PIECE_BYTES) / GIB,
        # So are the joined weights themselves.
        "planned_resume": (memory.host.resume + SINGLE * memory.static.num_joined) / GIB,
        "parts": {name: value / GIB for name, value in memory.as_json().items() if isinstance(value, float)},
    }


def planned_by_bounds(config: Any, folder: Path) -> dict[str, Any]:
    """The plan of an update in GiB, as the command line makes it."""
    from perl_megatron.config.derive import derive
    from perl_megatron.plan.assumptions import Assumptions
    from perl_megatron.plan.device_plan import Device, make_device_plan
    from perl_megatron.plan.gpus import GIB, gpu_of

    numbers = _numbers(folder)
    derived = derive(config, world_size=1, architecture=numbers, command="train")
    plan = make_device_plan(config, derived, numbers, Device.of(gpu_of("cpu"), Assumptions(), processes=1))
    return {"planned_bounds": plan.stages[0].phases["update"] / GIB}


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
    parser.add_argument("--filled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.case, options.folder, options.recompute, filled=options.filled)))
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
                # Of a tiny policy's, nearly all is what the allocator keeps.
                of_state = ("checkpoint", "resume") if name != "tiny" and recompute == "none" else ()
                for keys, filled in ((("growth", "whole", *of_state), []), (("bounds",), ["--filled"])):
                    arguments = ["--case", name, "--folder", folder, "--recompute", recompute, *filled]
                    results = run_in_turn(
                        Path(__file__), [WORKER], arguments, rounds=options.rounds, threads=options.threads
                    )[WORKER]
                    for key in keys:
                        plan, real = ([one[field] for one in results] for field in (f"planned_{key}", key))
                        label = f"{name}, recompute {recompute}: {key}"
                        rows.append(make_row(label, plan, "measured", real, "GiB", None))
                        if key != "growth" or name != "tiny":
                            worst = max(worst, abs(rows[-1].ratio - 1))
    report(f"planned and measured memory, {options.threads} threads", rows, options.json)
    if worst > BOUND:
        sys.exit(f"the plan is off by {worst:.0%}, more than {BOUND:.0%}")


if __name__ == "__main__":
    main()
