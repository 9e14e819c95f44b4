"""The loss step of one group, shared and not shared: `python benchmarks/group_step.py [--quick] [--json FILE]`.

Permuted GRPO trains on (n_s + 1) · n responses to n_s + 1 orders of the same images. Ours with `actor.sharing` full,
vision and none, and TRL's GRPOTrainer, on the same weights (float32), images, token ids, advantages and old
log-probabilities, each in fresh processes of the same number of threads, in turn. In the first round the loss and the
gradient of all sides have to agree, vision included, or nothing is reported, and floating-point operations are counted.

Every side takes the group as one micro-batch. The case of the goals has more sides: those that share nothing also take
it one sequence at a time, which needs less memory and may be faster; and TRL scores the response tokens only, as it
does on a GPU, while on a CPU its output layer scores the prompt's tokens too.

Timed is what a training step does before its optimizer. Ours: ``Actor.update``, which lays out the batch, makes the
forward and backward passes with the fused loss, and adds up the metrics. TRL's: see ``group_step_trl.py``. No side
recomputes layers. Memory is what the first step needs at its peak over weights and gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import Row, make_row, report, resident_gib, run_in_turn, write_rows

from perl_megatron.runtime import environment

environment.prepare_process()

from perl_megatron.runtime import platform  # noqa: E402

platform.install()  # before anything imports megatron-core or transformers

import torch  # noqa: E402
from group_step_cases import (  # noqa: E402
    ALL_CASES,
    CASES,
    QUICK,
    SWEEP,
    TARGET,
    Case,
    make_encoder,
    make_group,
    write_case,
)
from group_step_flops import count, minimum  # noqa: E402
from group_step_trl import INSTALL, TrlStep, missing_modules  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from perl_megatron.checkpoint.stream import export_tensors  # noqa: E402
from perl_megatron.config.schema import Config  # noqa: E402
from perl_megatron.runtime import topology  # noqa: E402
from perl_megatron.train.actor import Actor  # noqa: E402
from perl_megatron.train.optimizer import StepOutcome  # noqa: E402

NAIVE, TRL, TRL_AS_ON_GPU = "none", "TRL", "TRL, responses only"
WHOLE_GROUP = 10**9
"""As `actor.micro_batch_tokens`."""
TIME_GOAL, MEMORY_GOAL, MISSED_GOAL = 1 / 3, 1.0, 0.1
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 1e-4, 1e-5
"""Relative. Both are far below what one token in a thousand would change."""
ENOUGH_SECONDS = 20.0
"""A process makes no further step after so many seconds of steps."""
PARTS = {"all": "", "vision": "visual."}
"""Beginnings of published names."""


class OurStep:
    """``Actor.update`` of the group, without the optimizer's own step."""

    new_gradient_bytes = 0
    """The gradient buffers are there before."""

    def __init__(
        self,
        case: Case,
        folder: Path,
        *,
        sharing: str,
        micro_batch_tokens: int = WHOLE_GROUP,
        dtype: str = "float32",
    ):
        config = Config.model_validate(
            {
                "model": {"path": folder / "policy", "dtype": dtype},
                "rollout": {"temperature": 1.0},
                "algorithm": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "kl_coefficient": 0.0},
                "actor": {"sharing": sharing, "micro_batch_tokens": micro_batch_tokens},
            }
        )
        self._layout = topology.initialize(config.parallel, seed=0, timeout_seconds=600)
        encoder = make_encoder(folder)
        self._sequences = make_group(case, folder, encoder)
        self._actor = Actor(config, self._layout, encoder, total_steps=1)
        self._actor.optimizer.step = no_step  # type: ignore[method-assign]
        gc.collect()
        gc.freeze()  # as ``jobs`` does

    def __call__(self) -> float:
        """Forward and backward of the whole group; gives the loss."""
        return self._actor.update(self._sequences)["loss"]

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Published name and gradient of every parameter, after a step."""

        def main_gradient(parameter: Any) -> torch.Tensor:
            gradient: torch.Tensor = parameter.main_grad
            return gradient

        return export_tensors(self._actor.modules, self._actor.architecture, self._layout, select=main_gradient)


def no_step(*, loss: float) -> StepOutcome:
    """In the place of the optimizer's."""
    return StepOutcome(skipped=False, gradient_norm=0.0, learning_rate=0.0)


SIDES: dict[str, Callable[[Case, Path], Any]] = {
    "full": lambda case, folder: OurStep(case, folder, sharing="full"),
    "vision": lambda case, folder: OurStep(case, folder, sharing="vision"),
    NAIVE: lambda case, folder: OurStep(case, folder, sharing="none"),
    TRL: lambda case, folder: TrlStep(case, folder, responses_only=False),
}
MORE_SIDES: dict[str, Callable[[Case, Path], Any]] = {
    TRL_AS_ON_GPU: lambda case, folder: TrlStep(case, folder, responses_only=True),
    f"{NAIVE}, one by one": lambda case, folder: OurStep(case, folder, sharing="none", micro_batch_tokens=1),
    f"{TRL_AS_ON_GPU}, one by one": lambda case, folder: TrlStep(
        case, folder, responses_only=True, micro_batches=case.views * case.rollouts
    ),
}
ALL_SIDES = SIDES | MORE_SIDES


def sides_of(name: str) -> list[str]:
    """Which sides a case has; full sharing first."""
    wanted = ALL_SIDES if name == TARGET else SIDES
    return [side for side in wanted if not side.startswith(TRL) or not missing_modules()]


def work(name: str, case: Case, folder: Path, *, checked: bool) -> dict[str, Any]:
    """Peak memory of the first step, and median seconds of up to three others.

    ``checked``: of the first step also the loss and the operations; its gradient goes to ``folder``.
    """
    step = ALL_SIDES[name](case, folder)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    resident = resident_gib("VmRSS")
    losses: list[float] = []
    if checked:
        operations = count(lambda: losses.append(step()))
    else:
        step()
    memory = resident_gib("VmHWM") - resident - step.new_gradient_bytes / 2**30
    found: dict[str, Any] = {"memory_gib": memory}
    if checked:
        found |= {"loss": losses[0], "operations": operations}
        gradients = {key: value.detach().clone() for key, value in step.gradients()}
        save_file(gradients, folder / f"{name}.safetensors")
        del gradients
    wall: list[float] = []
    processor: list[float] = []
    while len(wall) < 3 and sum(wall) < ENOUGH_SECONDS:
        before, before_processor = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - before)
        processor.append(time.process_time() - before_processor)
    return found | {"seconds": statistics.median(wall), "processor_seconds": statistics.median(processor)}


def relative_errors(folder: Path, name: str, other: str) -> dict[str, float]:
    """‖a - b‖ / ‖b‖ of the gradients that two sides left in ``folder``, for each of ``PARTS``."""
    mine, right = (load_file(folder / f"{side}.safetensors") for side in (name, other))
    assert mine.keys() == right.keys(), f"{name} and {other} have gradients of {mine.keys() ^ right.keys()}"
    errors = {}
    for part, beginning in PARTS.items():
        keys = [key for key in right if key.startswith(beginning)]
        wrong = sum(float((mine[key].double() - right[key].double()).square().sum()) for key in keys)
        errors[part] = math.sqrt(wrong / sum(float(right[key].double().square().sum()) for key in keys))
    return errors


def agree(name: str, first: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print each side's loss, gradient and operations; end the program where one did other work than the last."""
    last = list(first)[-1]
    print(f"{name}: loss, relative errors of the gradient against '{last}', 10^12 operations")
    for side, found in first.items():
        errors = relative_errors(folder, side, last)
        shown = ", ".join(f"{part} {error:.1e}" for part, error in errors.items())
        print(f"  {side}: {found['loss']:.7f}; {shown}; {found['operations'] / 1e12:.4g}", flush=True)
        right = first[last]["loss"]
        if max(errors.values()) > GRADIENT_TOLERANCE or abs(found["loss"] - right) > LOSS_TOLERANCE * abs(right):
            sys.exit(f"{name}: '{side}' and '{last}' do not compute the same")


def compare(name: str, folder: Path, *, rounds: int, threads: int) -> list[Row]:
    """The rows of one case; the sides are checked in the first round."""
    sides, script = sides_of(name), Path(__file__)
    arguments = ["--case", name, "--folder", str(folder)]
    results = run_in_turn(script, sides, [*arguments, "--checked"], rounds=1, threads=threads)
    first = {side: found[0] for side, found in results.items()}
    agree(name, first, folder)
    others = run_in_turn(script, sides[::-1], arguments, rounds=rounds - 1, threads=threads)
    rows = []
    for key, label, unit, goal in (
        ("seconds", "forward + backward", "s", TIME_GOAL),
        ("processor_seconds", "processor time", "s", None),
        ("memory_gib", "peak memory", "GiB", MEMORY_GOAL),
    ):
        values = {side: [each[key] for each in results[side] + others[side]] for side in sides}
        for peer in sides[1:]:
            # One sequence at a time needs a twelfth of the activations; memory is compared for equal micro-batches.
            compared = peer in (NAIVE, TRL, TRL_AS_ON_GPU) or (key == "seconds" and peer != "vision")
            wanted = goal if name == TARGET and compared else None
            rows.append(make_row(f"{name}: {label}", values["full"], peer, values[peer], unit, wanted))
        if key == "seconds":
            seconds = {side: statistics.median(values[side]) for side in ("full", NAIVE)}
    least = minimum(make_group(ALL_CASES[name], folder, make_encoder(folder)), folder / "policy")
    operations = {side: found["operations"] for side, found in first.items()}
    return rows + rows_of_operations(name, operations, least, seconds["full"] / seconds[NAIVE])


def rows_of_operations(name: str, operations: dict[str, int], least: int, time_left: float) -> list[Row]:
    """Those done by each side against full sharing's; ``time_left``: full sharing's time over that of none."""
    tera = {side: number / 1e12 for side, number in (operations | {"the least": least}).items()}

    def row(label: str, ours: float, peer: str, theirs: float, unit: str, goal: float | None = None) -> Row:
        return make_row(f"{name}: {label}", [ours], peer, [theirs], unit, goal)

    rows = [row("operations", tera["full"], peer, tera[peer], "10^12") for peer in list(tera)[1:]]
    beyond = {side: tera[side] - tera["the least"] for side in ("full", NAIVE)}
    goal = None if name in QUICK else MISSED_GOAL
    rows.append(row("operations beyond the least", beyond["full"], NAIVE, beyond[NAIVE], "10^12", goal))
    operations_left = tera["full"] / tera[NAIVE]
    return [*rows, row("time left", time_left, "operations left", operations_left, f"of {NAIVE}'s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tiny case only, one round")
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes of each side in the case of the goals; else one"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", choices=CASES | SWEEP, help=f"of: {'; '.join(CASES | SWEEP)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", choices=ALL_SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=ALL_CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case = ALL_CASES[options.case]
        print(json.dumps(work(options.worker, case, options.folder, checked=options.checked)))
        return
    if missing := missing_modules():
        print(f"TRL's trainer is left out; it needs {', '.join(missing)}: `{INSTALL}`")
    rows: list[Row] = []
    for name in QUICK if options.quick else options.only or CASES | SWEEP:
        rounds = options.rounds if name == TARGET else 1
        with tempfile.TemporaryDirectory() as folder:
            write_case(ALL_CASES[name], Path(folder))
            found = compare(name, Path(folder), rounds=rounds, threads=options.threads)
        report(f"step of a group, float32, {options.threads} threads", found, None)
        rows += found
        if options.json:  # after each case: all of them take hours
            write_rows(rows, options.json)


if __name__ == "__main__":
    main()
