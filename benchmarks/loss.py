"""Loss kernels against their peers: `python benchmarks/loss.py [--quick] [--device cuda] [--rounds N] [--json FILE]`.

Forward and backward of GRPO's loss from hidden states [T, H] and the output weight [V, H], to the gradients of both. A
row for each peer: naive torch, Liger, cut-cross-entropy, TRL's chunked log-probability, and the matrix-product floor:
the four products of 2·T·H·V floating-point operations that a pass with recomputed logits cannot do without, by
themselves. Each side runs in fresh processes, in turn, on the same numbers. Seconds are processor seconds over the
number of threads (of the clock with ``--device cuda``), which another job on the machine disturbs less. Memory is what
a pass needs at its peak over inputs and their gradients. Peers that are not installed are left out, and named;
cut-cross-entropy needs triton: `pip install --no-deps -r requirements/kernels.lock`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_by_side import Row, make_row, report, resident_gib, run_in_turn
from torch import Tensor

from perl_megatron.algorithm.objective import clipped_objective, kl_estimate, token_log_ratio
from perl_megatron.kernels import native
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions

SEQUENCES, CLIP, BETA = 8, 0.2, 0.04
MEMORY_GOAL_GIB = 100e6 / 2**30
FLOOR_GOAL = 1.15
FLOOR = "matrix products"


@dataclass(frozen=True)
class Case:
    """Sizes; T is divisible by ``SEQUENCES``."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str


CASES = {
    f"{label} {dtype}": Case(tokens, 1024, vocabulary, dtype)
    for label, tokens, vocabulary in (("4096×32k", 4096, 32_000), ("512×152k", 512, 152_064))
    for dtype in ("float32", "bfloat16")
}
GPU_CASES = {
    "8192×3B's bfloat16": Case(8192, 2048, 151_936, "bfloat16"),
    "8192×7B's bfloat16": Case(8192, 3584, 152_064, "bfloat16"),
}
"""Hidden size and vocabulary of the published models."""
QUICK = {"quick float32": Case(64, 64, 3000, "float32")}


class Pass:
    """One forward and backward pass; the loss of all sides is the same."""

    def __init__(self, case: Case, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.case = case
        self.hidden = normal(case.tokens, case.hidden).to(device, dtype).requires_grad_()
        self.weight = (normal(case.vocabulary, case.hidden) * case.hidden**-0.5).to(device, dtype).requires_grad_()
        self.targets = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator).to(device)
        self.advantages = normal(SEQUENCES).to(device)
        self.old = -10.9 + 0.1 * normal(case.tokens).to(device)
        self.reference = self.old + 0.1 * normal(case.tokens).to(device)

    def loss(self, log_prob: Tensor) -> Tensor:
        """Mean over tokens."""
        advantage = self.advantages.repeat_interleave(self.case.tokens // SEQUENCES)
        bounds: dict[str, Any] = {"clip_low": CLIP, "clip_high": CLIP, "dual_clip": None}
        policy = clipped_objective(token_log_ratio(log_prob, self.old), advantage, **bounds).loss
        return (policy + BETA * kl_estimate(log_prob, self.reference, "k3")).mean()

    def ours(self) -> Tensor:
        options = ScoreOptions(entropy=False)
        return self.loss(score_tokens(self.hidden, self.weight, self.targets, options=options).log_prob)

    def naive(self) -> Tensor:
        log_p = (self.hidden @ self.weight.t()).float().log_softmax(-1)
        return self.loss(log_p.gather(1, self.targets[:, None])[:, 0])

    def liger(self) -> Tensor:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

        shape = (SEQUENCES, -1)
        settings: dict[str, Any] = {"epsilon_low": CLIP, "epsilon_high": CLIP, "beta": BETA, "loss_type": "bnpo"}
        compiled = self.hidden.is_cuda  # its default, which takes minutes on a CPU
        grpo = LigerFusedLinearGRPOLoss(compiled=compiled, use_ref_model=True, chunk_size=1, **settings)
        targets = self.targets.view(shape)
        loss: Tensor = grpo(
            self.hidden.view(*shape, self.case.hidden),
            self.weight,
            targets,
            torch.ones_like(targets, dtype=torch.float32),
            self.advantages,
            ref_per_token_logps=self.reference.view(shape),
            old_per_token_logps=self.old.view(shape),
        )[0]
        return loss

    def cut_cross_entropy(self) -> Tensor:
        if self.hidden.is_cuda:  # its Triton kernels, which leave out gradients that are too small for bfloat16
            from cut_cross_entropy import linear_cross_entropy

            return self.loss(-linear_cross_entropy(self.hidden, self.weight, self.targets, reduction="none"))
        from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

        return self.loss(-torch_compile_linear_cross_entropy(self.hidden, self.weight, self.targets, reduction="none"))

    def trl(self) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        # The backward pass asks this module for DeepSpeed's sharded weights, of which there are none; its import would
        # need most of what a TRL trainer does.
        no_shards = types.SimpleNamespace(maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())
        sys.modules.setdefault("trl.trainer.utils", no_shards)  # type: ignore[arg-type]
        log_prob = ChunkedLogProbFunction.apply(self.hidden, self.weight, None, self.targets, 1.0, 4096, None, 1.0, ())
        return self.loss(log_prob[0])

    @torch.no_grad()
    def products(self) -> Tensor:
        """The floor: logits twice, and both gradients, in vocabulary tiles as large as serves them best."""
        hidden, weight, size = self.hidden, self.weight, 4096
        self.hidden.grad, self.weight.grad = torch.zeros_like(hidden), torch.empty_like(weight)
        logits = hidden.new_empty(self.case.tokens, size)
        for first in range(0, len(weight), size):
            rows = weight[first : first + size]
            z = logits[:, : len(rows)]
            for _ in range(2):
                torch.mm(hidden, rows.t(), out=z)
            self.hidden.grad.addmm_(z, rows)
            torch.mm(z.t(), hidden, out=self.weight.grad[first : first + size])
        return logits.new_zeros(())

    def run(self, name: str) -> float:
        """The loss."""
        self.hidden.grad = self.weight.grad = None
        loss: Tensor = SIDES[name](self)
        if loss.requires_grad:
            loss.backward()
        return loss.item()


PEER_MODULES = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "TRL": "trl"}
SIDES: dict[str, Callable[[Pass], Tensor]] = {
    "ours": Pass.ours,
    FLOOR: Pass.products,
    "naive": Pass.naive,
    "Liger": Pass.liger,
    "cut-cross-entropy": Pass.cut_cross_entropy,
    "TRL": Pass.trl,
}


def is_installed(side: str) -> bool:
    """Also with what it imports at once: cut-cross-entropy needs triton."""
    needed = [PEER_MODULES[side]] if side in PEER_MODULES else []
    needed += ["triton"] if side == "cut-cross-entropy" else []
    return all(importlib.util.find_spec(name) is not None for name in needed)


def peak_memory(run: Pass, name: str, device: torch.device) -> float:
    """GiB that a pass needs over its inputs and their gradients."""
    run.hidden.grad = run.weight.grad = None
    gradients = sum(each.numel() * each.element_size() for each in (run.hidden, run.weight))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.run(name)
        return (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident_gib("VmRSS")
    run.run(name)
    return resident_gib("VmHWM") - before - gradients / 2**30


def work(name: str, case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median seconds after one pass that warms up, peak memory, and the loss, for the sides to agree on."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return (usage.ru_utime + usage.ru_stime) / torch.get_num_threads()

    run = Pass(case, device)
    loss = run.run(name)
    seconds = []
    for _ in range(repeats):
        begin = now()
        run.run(name)
        seconds.append(now() - begin)
    norms = [each.grad.double().norm().item() for each in (run.hidden, run.weight) if each.grad is not None]
    return {
        "seconds": statistics.median(seconds),
        "memory": peak_memory(run, name, device),
        "loss": loss,
        "gradient_norms": norms,
    }


def compare(label: str, case: Case, options: argparse.Namespace) -> list[Row]:
    """The rows of one case; ends the program where the sides did not do the same work."""
    sides = [name for name in SIDES if is_installed(name)]
    arguments = ["--case", label, "--device", options.device, "--repeats", str(1 if options.quick else options.repeats)]
    results = run_in_turn(
        Path(__file__), sides, arguments, rounds=1 if options.quick else options.rounds, threads=options.threads
    )
    ours = results["ours"]
    rounding = 1e-4 if case.dtype == "float32" else 2e-2
    rows = []
    for name in sides[1:]:
        theirs = results[name]
        for side in (ours[0], theirs[0]):
            side["results"] = [side["loss"], *side["gradient_norms"]]
        mine, other = ours[0]["results"], theirs[0]["results"]
        agree = all(abs(a - b) <= rounding * abs(a) for a, b in zip(mine, other, strict=True))
        if name != FLOOR and not agree:
            sys.exit(f"{label}: loss and norms of both gradients are {mine} here and {other} by {name}")
        goal = FLOOR_GOAL if name == FLOOR and case.dtype == "float32" else None
        if case.dtype == "bfloat16" and (name != FLOOR or native.why_not() is None):
            goal = 1.0
        seconds = ([each["seconds"] for each in side] for side in (ours, theirs))
        rows.append(make_row(f"{label}: forward + backward", next(seconds), name, next(seconds), "s", goal))
        if name != FLOOR:
            memory = ([each["memory"] for each in side] for side in (ours, theirs))
            rows.append(make_row(f"{label}: peak memory", next(memory), name, next(memory), "GiB", None))
    memory_goal = [MEMORY_GOAL_GIB] * len(ours)
    rows.append(make_row(f"{label}: peak memory", [each["memory"] for each in ours], "100 MB", memory_goal, "GiB", 1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small case, one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each process after one that warms up")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case = (CASES | GPU_CASES | QUICK)[options.case]
        print(json.dumps(work(options.worker, case, torch.device(options.device), options.repeats)))
        return
    if missing := [name for name in SIDES if not is_installed(name)]:
        print(f"not installed, left out: {', '.join(missing)}")
    rows: list[Row] = []
    cases = GPU_CASES if options.device == "cuda" else CASES
    for label, case in (QUICK if options.quick else cases).items():
        rows += compare(label, case, options)
    report(f"loss kernels, {options.device}, {options.threads} threads", rows, options.json)


if __name__ == "__main__":
    main()
