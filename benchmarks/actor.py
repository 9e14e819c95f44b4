"""Forward and backward of the policy against transformers: `python benchmarks/actor.py [--quick] [--json FILE]`.

Same weights (float32), same sequences, one process and the same number of threads each. Both sides compute the logits
of the response positions only, and the gradient of every parameter; the difference of their losses is checked. Every
sequence has images of its own, so that nothing is saved by encoding a repeated image once.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import make_row, report, run_in_turn

from perl_megatron.runtime import platform

platform.install()  # before anything imports megatron-core or transformers

import numpy as np  # noqa: E402
import torch  # noqa: E402

from perl_megatron.checkpoint.hf_files import open_checkpoint  # noqa: E402
from perl_megatron.checkpoint.stream import import_weights  # noqa: E402
from perl_megatron.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from perl_megatron.kernels.logprob import vocabulary_parallel_log_prob  # noqa: E402
from perl_megatron.model.architecture import read_architecture  # noqa: E402
from perl_megatron.model.policy import build_policy  # noqa: E402
from perl_megatron.runtime import topology  # noqa: E402
from perl_megatron.train.batch import TrainingSequence, collate  # noqa: E402
from perl_megatron.types import EncodedPrompt  # noqa: E402

PEER = "transformers"
IMAGE_TOKEN, VISION_START, VISION_END = 7, 5, 6


@dataclass(frozen=True)
class Case:
    """Sizes of the model and of one micro-batch."""

    text: dict[str, Any]
    vision: dict[str, Any]
    rows: int
    images: int
    """In each row."""
    side: int
    """Of an image, in patches of 14 pixels."""
    prompt_words: int
    """Text tokens of a prompt beside its images."""
    response: int
    repeats: int


def _text(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    half = hidden // heads // 2
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    }


def _vision(depth: int, hidden: int, ffn: int, heads: int, out: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": heads,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [depth - 1],
    }


CASES = {
    # The demo's policy, on images of a few merged tokens.
    "tiny": Case(_text(4, 128, 224, 4, 2, 704), _vision(4, 64, 144, 4, 128), 8, 2, 8, 40, 24, 10),
    # Layers of the 3B model, two of the language model's and four of the tower's (one with full attention); fewer rows
    # in the vocabulary, whose logits are the fused loss kernels' subject.
    "3B layers": Case(_text(2, 2048, 11008, 16, 2, 16384), _vision(4, 1280, 3420, 16, 2048), 2, 2, 16, 64, 64, 3),
}


def write_case(case: Case, folder: Path) -> None:
    """A checkpoint with random weights: float32, norms and biases random too."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=case.text,
        vision_config=case.vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=8,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Inputs:
    """Rows of one length, nothing padded."""

    sequences: list[TrainingSequence]
    patches: dict[str, np.ndarray]


def make_inputs(case: Case) -> Inputs:
    """The case's micro-batch, the same in every process."""
    random = np.random.default_rng(1)
    cells = case.side**2 // 4
    sequences, patches = [], {}
    for row in range(case.rows):
        tokens, starts, keys = list(random.integers(10, 700, case.prompt_words)), [], []
        for image in range(case.images):
            keys.append(f"{row}-{image}")
            patches[keys[-1]] = random.standard_normal((case.side**2, 1176), dtype=np.float32)
            tokens.append(VISION_START)
            starts.append(len(tokens))
            tokens += [IMAGE_TOKEN] * cells + [VISION_END]
        prompt = EncodedPrompt(
            token_ids=np.array(tokens, dtype=np.int64),
            compact_ids=(),
            image_starts=tuple(starts),
            grids=np.array([[1, case.side, case.side]] * case.images),
            image_keys=tuple(keys),
        )
        sequences.append(TrainingSequence(prompt=prompt, response=random.integers(10, 700, case.response)))
    return Inputs(sequences, patches)


def our_step(case: Case, folder: Path) -> Callable[[], float]:
    """A function that does one forward and backward pass and gives the loss."""
    parallel = ParallelConfig()
    layout = topology.initialize(parallel, seed=0, timeout_seconds=600)
    architecture = read_architecture(folder)
    chunks = build_policy(architecture, ModelConfig(path=folder, dtype="float32"), parallel, layout)
    import_weights(chunks, architecture, layout, open_checkpoint(folder))
    inputs = make_inputs(case)

    def step() -> float:
        # Laying the batch out is part of the actor's work (transformers' positions are part of its own).
        batch = collate(
            inputs.sequences,
            range(case.rows),
            length_multiple=1,
            pad_token_id=0,
            patches=inputs.patches.__getitem__,
            device=torch.device("cpu"),
        )
        for parameter in chunks[0].parameters():
            parameter.grad = None
        logits = chunks[0](batch.token_ids, batch.position_ids, batch.vision, batch.output_mask)
        loss = -vocabulary_parallel_log_prob(logits, batch.targets)[0].mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in chunks[0].parameters())
        return loss.item()

    return step


def their_step(case: Case, folder: Path) -> Callable[[], float]:
    """The same by transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    inputs = make_inputs(case)
    rows = [np.concatenate([each.prompt.token_ids, each.response]) for each in inputs.sequences]
    ids = torch.from_numpy(np.stack(rows))
    pixels = torch.from_numpy(np.concatenate(list(inputs.patches.values())))
    grids = torch.from_numpy(np.concatenate([each.prompt.grids for each in inputs.sequences]))

    def step() -> float:
        model.zero_grad(set_to_none=True)
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
            pixel_values=pixels,
            image_grid_thw=grids,
            use_cache=False,
            logits_to_keep=case.response + 1,
        ).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -case.response :].flatten())
        loss.backward()
        return loss.item()

    return step


def work(name: str, case: Case, folder: Path) -> dict[str, float]:
    """Median seconds of a step after two that warm up, processor seconds, peak memory of this process."""
    step = {"ours": our_step, PEER: their_step}[name](case, folder)
    losses = [step(), step()]
    wall, processor = [], []
    for _ in range(case.repeats):
        before, before_processor = time.perf_counter(), time.process_time()
        losses.append(step())
        wall.append(time.perf_counter() - before)
        processor.append(time.process_time() - before_processor)
    assert max(losses) - min(losses) <= 1e-6 * losses[0], "a repeated step gave another loss"
    return {
        "seconds": float(np.median(wall)),
        "processor_seconds": float(np.median(processor)),
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": losses[-1],
    }


def profile(case: Case, folder: Path) -> str:
    """Where our time goes: torch's profile of one step, the dearest operations first."""
    step = our_step(case, folder)
    step()
    with torch.profiler.profile() as trace:
        step()
    return trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the tiny case only, one round")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--profile", action="store_true", help="print where our time goes, instead of comparing")
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
            if options.profile:
                torch.set_num_threads(options.threads)
                print(f"{name}\n{profile(CASES[name], Path(folder))}")
                topology.forget_layout()
                continue
            results = run_in_turn(
                Path(__file__),
                ["ours", PEER],
                ["--case", name, "--folder", folder],
                rounds=1 if options.quick else options.rounds,
                threads=options.threads,
            )
        ours, theirs = results["ours"], results[PEER]
        if not math.isclose(ours[0]["loss"], theirs[0]["loss"], rel_tol=1e-5):
            sys.exit(f"{name}: the losses differ: {ours[0]['loss']} and {theirs[0]['loss']}")
        for label, key, unit, goal in (
            ("forward + backward", "seconds", "s", 1.0),
            ("processor time", "processor_seconds", "s", None),
            ("peak memory", "memory_gib", "GiB", None),
        ):
            values = ([each[key] for each in side] for side in (ours, theirs))
            rows.append(make_row(f"{name}: {label}", next(values), PEER, next(values), unit, goal))
    if rows:
        report(f"actor, float32, {options.threads} threads", rows, options.json)


if __name__ == "__main__":
    main()
