"""Rollouts through our engine against vLLM bare: `python benchmarks/rollout.py [--quick] [--rounds N] [--json FILE]`.

The same requests with the same sampling parameters, each side in fresh processes: questions over two to four images,
each in two orders, several responses to each, in every call over images that no call before had. Bare is one call of
``LLM.generate``, without what our engine adds: statistics, caches dropped before a call, text, log-probabilities as
arrays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import Row, make_row, report, run_in_turn

from perl_megatron.runtime import environment

environment.prepare_process()

from perl_megatron.runtime import platform  # noqa: E402

platform.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402

GOAL = 1 / 0.95
QUESTIONS, ROLLOUTS, TOKENS, IMAGES = 16, 6, 48, 8
SIDES = ("ours", "bare vLLM")


class Case:
    """The questions, and an engine for them."""

    def __init__(self, folder: Path, num_questions: int, num_calls: int):
        from perl_megatron.config.schema import ParallelConfig, RolloutConfig
        from perl_megatron.data.processor import PromptEncoder
        from perl_megatron.rollout.engine import Sampling
        from perl_megatron.rollout.vllm_colocated import VllmColocatedEngine
        from perl_megatron.runtime import topology

        encoder = PromptEncoder(folder / "policy", system_prompt="Think.")
        self.views = [
            [view for number in range(num_questions) for view in views_of(folder / "images", call, number)]
            for call in range(num_calls)
        ]
        self.prompts = [[encoder.encode(view) for view in views] for views in self.views]
        self.sampling = Sampling(num_rollouts=ROLLOUTS, temperature=1.0, top_p=1.0, max_tokens=TOKENS)
        self.engine = VllmColocatedEngine(
            RolloutConfig(cpu_cache_gib=0.5),
            encoder=encoder,
            model_path=folder / "policy",
            topology=topology.initialize(ParallelConfig(), seed=0, timeout_seconds=600),
            tensor_parallel_size=1,
            seed=0,
            dtype=torch.float32,
            max_model_length=max(len(prompt.token_ids) for prompts in self.prompts for prompt in prompts) + TOKENS,
            max_images=4,
        )

    def seeds(self, call: int) -> list[int]:
        """Of one call; another call samples other responses."""
        return [call * len(self.views[call]) + index for index in range(len(self.views[call]))]

    def ours(self, call: int) -> int:
        """Sampled tokens."""
        rollouts = self.engine.generate(self.views[call], self.prompts[call], self.sampling, seeds=self.seeds(call))
        return sum(len(rollout.token_ids) for rollout in rollouts)

    def bare(self, call: int) -> int:
        """Sampled tokens, by the engine's own ``LLM``."""
        engine: Any = self.engine
        requests = [engine._request(prompt) for prompt in self.prompts[call]]
        parameters = [engine._sampling_parameters(self.sampling, seed) for seed in self.seeds(call)]
        outputs = engine._llm.generate(requests, parameters, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


def views_of(folder: Path, call: int, number: int) -> list[Any]:
    """Both orders of a question, over images of this call alone."""
    from perl_megatron.types import IMAGE_PLACEHOLDER, View

    count = 2 + number % 3
    images = [folder / f"{call}-{(number + slot) % IMAGES}.png" for slot in range(count)]
    text = "".join(f"Image {slot + 1}: {IMAGE_PLACEHOLDER} " for slot in range(count)) + "Which image shows the 7?"
    orders = tuple(range(count)), tuple(reversed(range(count)))
    return [
        View(str(number), index, order, tuple(images[slot] for slot in order), text, "1", "number")
        for index, order in enumerate(orders)
    ]


def prepare(folder: Path, num_calls: int) -> None:
    """A tiny random policy, and ``IMAGES`` images for each call."""
    from PIL import Image

    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    from make_tiny_policy import TinyShape, make_tiny_policy

    make_tiny_policy(folder / "policy", TinyShape(tie=True), seed=0)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(num_calls * IMAGES):
        pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number // IMAGES}-{number % IMAGES}.png")


def work(side: str, folder: Path, num_questions: int, repeats: int) -> dict[str, Any]:
    """Median seconds for a thousand tokens, after a call that warms up."""
    if side != "ours":
        from perl_megatron.rollout import vllm_start

        arguments: Callable[..., dict[str, Any]] = vllm_start.arguments
        vllm_start.arguments = lambda *args, **options: arguments(*args, **options) | {"disable_log_stats": True}
        from perl_megatron.rollout import vllm_colocated

        vllm_colocated.VllmCounters = lambda llm, model: None  # type: ignore[assignment,misc]
    case = Case(folder, num_questions, repeats + 1)
    call = case.ours if side == "ours" else case.bare
    seconds, tokens = [], 0
    for number in range(repeats + 1):
        begin = time.perf_counter()
        tokens = call(number)
        seconds.append((time.perf_counter() - begin) / tokens * 1000)
    use = case.engine.take_cache_use().metrics() if side == "ours" else {}
    case.engine.close()
    return {"seconds": statistics.median(seconds[1:]), "tokens": tokens, **use}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two questions, one round")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each process after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    num_questions, repeats = (2, 1) if options.quick else (QUESTIONS, options.repeats)
    if options.worker:
        print(json.dumps(work(options.worker, options.folder, num_questions, repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), repeats + 1)
        results = run_in_turn(
            Path(__file__),
            SIDES,
            ["--folder", folder, "--repeats", str(repeats), *(["--quick"] if options.quick else [])],
            rounds=1 if options.quick else options.rounds,
            threads=options.threads,
        )
    ours, bare = (results[side] for side in SIDES)
    sampled, expected = ours[0]["tokens"], bare[0]["tokens"]
    if abs(sampled - expected) > 0.02 * expected:  # a cached prompt may change a token by its rounding
        sys.exit(f"the same requests gave {sampled} tokens here and {expected} by {SIDES[1]}")
    print({name: round(value, 3) for name, value in ours[0].items() if "hit_rate" in name})
    seconds = [[each["seconds"] for each in side] for side in (ours, bare)]
    rows: list[Row] = [make_row("1000 tokens", seconds[0], SIDES[1], seconds[1], "s", GOAL)]
    report(f"rollouts, {options.threads} threads", rows, options.json)


if __name__ == "__main__":
    main()
