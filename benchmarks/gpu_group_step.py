"""The loss step of one group on a GPU, in bfloat16: `python benchmarks/gpu_group_step.py [--rounds N] [--json FILE]`.

As ``group_step.py`` on a CPU: permuted GRPO's (n_s + 1) · n responses to n_s + 1 orders of the same images, ours with
`actor.sharing` full, vision and none, and TRL's GRPOTrainer, on the same weights, images, token ids, advantages and old
log-probabilities, each in a fresh process, in turn. The policy has Qwen2.5-VL-3B's widths and vocabulary, and a sixth
of its layers. Ours runs on Transformer Engine's layers and the Triton loss kernel where they are installed, as a line
above the table says. Losses of all sides have to agree to what bfloat16 rounds, or nothing is reported.

Timed is ``Actor.update`` without the optimizer's own step, and TRL's ``training_step``, between two synchronizations.
Memory is what a step allocates at its peak over what was allocated before it; TRL's gradients are taken off.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import Row, make_row, report, run_in_turn

from perl_megatron.runtime import environment

environment.prepare_process()

from perl_megatron.runtime import platform  # noqa: E402

platform.install()  # before anything imports megatron-core or transformers

import torch  # noqa: E402
from group_step import OurStep  # noqa: E402
from group_step_cases import Case, Shape, write_case  # noqa: E402
from group_step_trl import INSTALL, TrlStep, missing_modules  # noqa: E402

from perl_megatron.kernels.dispatch import choose_backend  # noqa: E402
from perl_megatron.model.layer_specs import uses_transformer_engine  # noqa: E402

SIXTH_OF_3B = Shape(2048, 11008, 16, 6, 1280, 3420, 16, 6, (2, 5), 151_936, kv_heads=2)
"""Qwen2.5-VL-3B's widths and vocabulary, 6 of 36 language layers, 6 of 32 vision blocks; with an output matrix of its
own."""
CASES = {
    f"{images} images, {tokens} tokens": Case(SIXTH_OF_3B, images, tokens) for images, tokens in ((2, 256), (4, 256))
}
CASES["4 images, 1024 tokens"] = Case(SIXTH_OF_3B, 4, 1024)
TINY = {"tiny": Case(Shape(128, 224, 4, 2, 64, 144, 4, 2, (1,), 1000, kv_heads=2), 3, 5, rollouts=2, side=56)}
LOSS_TOLERANCE = 0.02
"""Absolute; the loss is a mean of advantages of standard deviation 1. Random weights and old log-probabilities that are
drawn around theirs keep most ratios within a third of 1, and bfloat16 moves a log-probability by about 0.01."""
SIDES = ("full", "vision", "none", "TRL")


def work(name: str, case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """Loss, peak memory of a step that is warm, and median seconds of ``repeats`` more."""
    step: Any
    if name == "TRL":
        step = TrlStep(case, folder, responses_only=True, dtype=torch.bfloat16)
    else:
        step = OurStep(case, folder, sharing=name, dtype="bfloat16")
    loss = step()
    gc.collect()
    _synchronize()
    memory = 0.0
    if platform.is_cuda():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    seconds = []
    for _ in range(repeats):
        _synchronize()
        begin = time.perf_counter()
        step()
        _synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "loss": loss,
        "memory_gib": memory,
        "seconds": statistics.median(seconds),
        "layers": "TransformerEngine" if uses_transformer_engine(torch.bfloat16) else "torch",
        "kernel": choose_backend(),
    }


def _synchronize() -> None:
    if platform.is_cuda():
        torch.cuda.synchronize()


def compare(name: str, case: Case, folder: Path, options: argparse.Namespace) -> list[Row]:
    """The rows of one case; ends the program where losses differ by more than bfloat16's rounding."""
    sides = [side for side in SIDES if side != "TRL" or not missing_modules()]
    arguments = ["--case", name, "--folder", str(folder), "--repeats", str(options.repeats)]
    results = run_in_turn(Path(__file__), sides, arguments, rounds=options.rounds, threads=8)
    losses = {side: found[0]["loss"] for side, found in results.items()}
    full = results["full"][0]
    print(f"{name}: losses {losses}; ours: layers of {full['layers']}, loss kernel {full['kernel']}", flush=True)
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
        sys.exit(f"{name}: the sides do not compute the same")
    rows = []
    for key, label, unit in (("seconds", "forward + backward", "s"), ("memory_gib", "peak memory", "GiB")):
        if not all(found[key] for side in results.values() for found in side):
            continue  # memory is measured on a GPU only
        values = {side: [found[key] for found in results[side]] for side in sides}
        for peer in sides[1:]:
            rows.append(make_row(f"{name}: {label}", values["full"], peer, values[peer], unit, None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tiny case, also on a CPU: shows that it runs")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=CASES, help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=1, help="fresh processes of each side")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES | TINY, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, (CASES | TINY)[options.case], options.folder, options.repeats)))
        return
    if not options.quick and not platform.is_cuda():
        parser.error("there is no GPU; benchmarks/group_step.py measures on a CPU")
    if missing := missing_modules():
        print(f"TRL's trainer is left out; it needs {', '.join(missing)}: `{INSTALL}`")
    rows: list[Row] = []
    cases = TINY if options.quick else {name: CASES[name] for name in options.only or CASES}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(cases.items()):
            here = Path(folder, str(number))
            here.mkdir()
            write_case(case, here, dtype=torch.bfloat16, device=platform.device())
            rows += compare(name, case, here, options)
    device = torch.cuda.get_device_name() if platform.is_cuda() else "CPU"
    report(f"step of a group, bfloat16, {device}", rows, options.json)


if __name__ == "__main__":
    main()
