"""Forward and backward of the actor against transformers: `python benchmarks/actor.py [--quick] [--json FILE]`.

Same weights (float32), same sequences in two equal micro-batches, one process and the same number of threads each.
Both sides compute the logits of the response positions only, and add up the gradient of every parameter: ours with all
that a training step has before its optimizer (gradient buffers, megatron-core's schedule, laying out of batches). Their
losses and their gradients' norms, part by part, have to be equal.
Both lay out a row for each sequence, and every sequence has images of its own: what sharing images and prompts saves is
measured by ``group_step.py``. Rows "of which" say where the time goes, from torch's profile of one step.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import Row, make_row, report, run_in_turn

from perl_megatron.runtime import platform

platform.install()  # before anything imports megatron-core or transformers

import numpy as np  # noqa: E402
import torch  # noqa: E402
from actor_cases import CASES, IMAGE_TOKEN, MICRO_BATCHES, Case, make_inputs, write_case  # noqa: E402

from perl_megatron.batching.cost import CostModel  # noqa: E402
from perl_megatron.batching.work import views_of  # noqa: E402
from perl_megatron.checkpoint.hf_files import open_checkpoint  # noqa: E402
from perl_megatron.checkpoint.qwen25_vl_table import published_name  # noqa: E402
from perl_megatron.checkpoint.stream import export_tensors, import_weights  # noqa: E402
from perl_megatron.config.schema import ActorSection, ModelConfig, OptimizerSection, ParallelConfig  # noqa: E402
from perl_megatron.model.architecture import read_architecture  # noqa: E402
from perl_megatron.model.policy import build_policy  # noqa: E402
from perl_megatron.runtime import topology  # noqa: E402
from perl_megatron.train.batch import MicroBatch  # noqa: E402
from perl_megatron.train.batch_layout import BatchLayout  # noqa: E402
from perl_megatron.train.losses import Sums, SupervisedLoss  # noqa: E402
from perl_megatron.train.optimizer import Optimizer  # noqa: E402
from perl_megatron.train.schedule import Schedule  # noqa: E402
from perl_megatron.train.scorer import Scorer  # noqa: E402

PEER = "transformers"
PARTS = ("visual.merger.", "visual.", "model.layers.", "")
"""Beginnings of published names; a tensor belongs to the first that fits."""
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::baddbmm"),
    "attention": ("scaled_dot_product", "_flash_attention"),
}
"""Kinds of work → parts of the names of torch's operations; all others are "the rest"."""


class Step:
    """One forward and backward pass."""

    def __call__(self) -> float:
        """Do it; gives the loss."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Published name and gradient of every parameter, after a pass."""
        raise NotImplementedError


class OurStep(Step):
    """What the actor does in an update before its optimizer."""

    def __init__(self, case: Case, folder: Path):
        parallel = ParallelConfig()
        self._layout = topology.initialize(parallel, seed=0, timeout_seconds=600)
        self._architecture = read_architecture(folder)
        self._chunks = build_policy(
            self._architecture, ModelConfig(path=folder, dtype="float32"), parallel, self._layout
        )
        import_weights(self._chunks, self._architecture, self._layout, open_checkpoint(folder))
        self._optimizer = Optimizer(OptimizerSection(), self._chunks, total_steps=1)
        self._scorer = Scorer(self._chunks[-1], self._layout)
        inputs = make_inputs(case)
        self._sequences, self._loss = inputs.sequences, SupervisedLoss(inputs.sequences)
        encoder: Any = inputs
        cost = CostModel(self._architecture.numbers, "vision")
        views = views_of([one.prompt for one in inputs.sequences], [len(one.response) for one in inputs.sequences])
        tokens = cost.memory(views[: case.rows // MICRO_BATCHES])
        actor = ActorSection(sharing="vision", micro_batch_tokens=tokens)
        layout = BatchLayout(self._layout, encoder, cost, actor=actor, parallel=parallel)
        assert len(layout.plan(inputs.sequences)) == MICRO_BATCHES
        self._schedule = Schedule(self._optimizer.chunks, self._layout, layout)
        gc.collect()
        gc.freeze()  # as ``jobs`` does

    def __call__(self) -> float:
        self._optimizer.zero_gradients()
        passes = self._schedule.run(self._sequences, self._micro_batch_loss, forward_only=False)
        return sum(float(sums["loss"]) for _, sums in passes)

    def _micro_batch_loss(self, batch: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, Sums]:
        scores = self._scorer(batch, hidden, entropy=True)
        return self._loss(batch, scores.log_prob, scores.entropy)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        def main_gradient(parameter: Any) -> torch.Tensor:
            gradient: torch.Tensor = parameter.main_grad
            return gradient

        return export_tensors(self._chunks, self._architecture, self._layout, select=main_gradient)


class TheirStep(Step):
    """The same by transformers."""

    def __init__(self, case: Case, folder: Path):
        from transformers import Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model: Any = model.train()
        inputs = make_inputs(case)
        rows = [np.concatenate([each.prompt.token_ids, each.response]) for each in inputs.sequences]
        self._ids = torch.from_numpy(np.stack(rows)).chunk(MICRO_BATCHES)
        self._pixels = torch.from_numpy(np.concatenate(list(inputs.all_patches.values()))).chunk(MICRO_BATCHES)
        grids = np.concatenate([each.prompt.grids for each in inputs.sequences])
        self._grids = torch.from_numpy(grids).chunk(MICRO_BATCHES)
        self._response = case.response

    def __call__(self) -> float:
        self._model.zero_grad(set_to_none=True)
        total = 0.0
        for ids, pixels, grids in zip(self._ids, self._pixels, self._grids, strict=True):
            logits = self._model(
                input_ids=ids,
                mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
                pixel_values=pixels,
                image_grid_thw=grids,
                use_cache=False,
                logits_to_keep=self._response + 1,
            ).logits[:, :-1]
            targets = ids[:, -self._response :].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets) / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        return total

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield published_name(name), parameter.grad


STEPS: dict[str, type[Step]] = {"ours": OurStep, PEER: TheirStep}


def work(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Seconds of the fastest step after two that warm up, processor seconds, peak memory of this process; a profile.

    The fastest, as whatever else runs on the machine only ever slows a step down.
    """
    step: Any = STEPS[name](case, folder)
    losses = [step(), step()]
    wall, processor = [], []
    for _ in range(case.repeats):
        before, before_processor = time.perf_counter(), time.process_time()
        losses.append(step())
        wall.append(time.perf_counter() - before)
        processor.append(time.process_time() - before_processor)
    assert max(losses) - min(losses) <= 1e-6 * losses[0], "a repeated step gave another loss"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    squares = dict.fromkeys(PARTS, 0.0)
    for tensor, gradient in step.gradients():
        squares[next(part for part in PARTS if tensor.startswith(part))] += float(gradient.double().square().sum())
    return {
        "seconds": min(wall),
        "processor_seconds": min(processor),
        "memory_gib": memory,
        "loss": losses[-1],
        "gradient_norms": [math.sqrt(square) for square in squares.values()],
        "kinds": profile(step),
    }


def profile(step: Step) -> dict[str, float]:
    """Where the processor's time goes in one step: seconds of each kind of work, all threads' callers added up."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        step()
    seconds = dict.fromkeys((*KINDS, "the rest"), 0.0)
    for event in trace.key_averages():
        fits = (kind for kind, names in KINDS.items() if any(name in event.key for name in names))
        seconds[next(fits, "the rest")] += event.self_cpu_time_total / 1e6
    return seconds


def compare(name: str, folder: Path, *, rounds: int, threads: int) -> list[Row]:
    """The rows of one case; ends the program where the two sides did not do the same work."""
    results = run_in_turn(
        Path(__file__), ["ours", PEER], ["--case", name, "--folder", str(folder)], rounds=rounds, threads=threads
    )
    ours, theirs = results["ours"], results[PEER]
    for key in ("loss", "gradient_norms"):
        mine, other = (np.array(side[0][key]) for side in (ours, theirs))
        if not np.allclose(mine, other, rtol=1e-4, atol=0):
            sys.exit(f"{name}: {key} differ: {mine} and {other}")

    def row(label: str, value: Callable[[dict[str, Any]], float], unit: str, goal: float | None = None) -> Row:
        mine, other = ([value(each) for each in side] for side in (ours, theirs))
        return make_row(f"{name}: {label}", mine, PEER, other, unit, goal)

    return [
        row("forward + backward", lambda each: each["seconds"], "s", 1.0),
        row("processor time", lambda each: each["processor_seconds"], "s"),
        *(
            row(f"of which {kind} (profile)", lambda each, kind=kind: each["kinds"][kind], "s")  # type: ignore[misc]
            for kind in (*KINDS, "the rest")
        ),
        row("peak memory", lambda each: each["memory_gib"], "GiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the tiny case only, one round")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, CASES[options.case], options.folder)))
        return
    rows = []
    for name in ["tiny"] if options.quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_case(CASES[name], Path(folder))
            rounds = 1 if options.quick else options.rounds
            rows += compare(name, Path(folder), rounds=rounds, threads=options.threads)
    report(f"actor, float32, {options.threads} threads", rows, options.json)


if __name__ == "__main__":
    main()
