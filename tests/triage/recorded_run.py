"""A small recorded run, and log-probabilities computed by transformers' own forward pass under a real fault.

Nothing here uses perl_megatron/triage: what triage has to find is made without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_images, make_policy

from perl_megatron.config.load import load_config
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.permutation import apply_order
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.observability.recorder import RolloutRecorder
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.rollout.embedded import EmbeddedEngine
from perl_megatron.rollout.engine import Sampling
from perl_megatron.rollout.sampling import log_distribution
from perl_megatron.runtime import platform
from perl_megatron.types import Group, PermutationContract, Record

platform.install()

SYSTEM_PROMPT = "Think."
TEMPERATURE = 0.8
SIZES = [(28, 56), (56, 84), (84, 28), (56, 112)]
ORDERS = {"two": [(0, 1), (1, 0)], "three": [(0, 1, 2), (2, 0, 1)], "none": [()]}
IMAGES = {"two": (0, 1), "three": (1, 2, 3), "none": ()}
SHAPE: dict[str, Any] = {"layers": 2, "vision_depth": 2, "scale": 4.0}


def make_policies(folder: Path, *, tie: bool = False) -> tuple[Path, Path]:
    """Two policies of one shape."""
    return tuple(make_policy(folder / name, seed=seed, tie=tie, **SHAPE) for seed, name in enumerate("ab"))


def mixed(folder: Path, base: Path, other: Path, takes: Callable[[str], bool]) -> Path:
    """``base`` with those weights of ``other`` whose published names are taken."""
    shutil.copytree(base, folder)
    weights, others = (load_file(path / "model.safetensors") for path in (base, other))
    taken = {name for name in weights if takes(name)}
    assert taken, sorted(weights)
    save_file(
        {name: others[name] if name in taken else tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


class Transformers:
    """transformers' own forward pass over prompt and response, with float32 weights and products in ``dtype``."""

    def __init__(self, policy: Path, encoder: PromptEncoder, dtype: torch.dtype = torch.float32):
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.encoder = encoder
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            policy, dtype=dtype, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def log_probs(
        self,
        row: Mapping[str, Any],
        *,
        keys: list[str] | None = None,
        prompt: list[int] | None = None,
        positions: np.ndarray | None = None,
        pixels: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        top_p: float = 1.0,
    ) -> list[float]:
        """Of the recorded response: over other images, another prompt, other positions [3, S], other pixel values."""
        prompt = row["prompt_token_ids"] if prompt is None else prompt
        keys = row["images"] if keys is None else keys
        ids = torch.tensor([[*prompt, *row["response_token_ids"]]])
        inputs: dict[str, Any] = {}
        if keys:
            patches = torch.cat([torch.from_numpy(self.encoder.patches(key)) for key in keys])
            inputs = {
                "pixel_values": pixels(patches).to(self.model.dtype),
                "image_grid_thw": torch.tensor([self.encoder._grids[key] for key in keys]),
                "mm_token_type_ids": (ids == self.encoder.image_token_id).int(),
            }
        if positions is not None:
            inputs["position_ids"] = torch.from_numpy(positions)[:, None]
        logits = self.model(input_ids=ids, use_cache=False, **inputs).logits[0, len(prompt) - 1 : -1].float()
        banned = self.encoder.banned_token_ids
        log_probs = log_distribution(logits, temperature=TEMPERATURE, top_p=top_p, banned_token_ids=banned)
        return log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@dataclass
class RecordedRun:
    """A run folder with one recorded step, right in all its numbers."""

    root: Path
    policy: Path
    encoder: PromptEncoder

    @property
    def file(self) -> Path:
        return next((self.root / "rollouts").glob("step-*.jsonl"))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def copy(self, target: Path) -> RecordedRun:
        shutil.copytree(self.root, target)
        return RecordedRun(target, self.policy, self.encoder)

    def rewrite(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> RecordedRun:
        """Replace some fields of every row."""
        rows = [row | change(row) for row in self.rows]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self


def record_run(
    folder: Path, policy: Path, sampled_by: Path, *, step: int = 1, settings: tuple[str, ...] = (), top_p: float = 1.0
) -> RecordedRun:
    """Rollouts of three questions in one or two orders, sampled by the embedded engine with ``sampled_by``.

    The run's `model.path` is ``policy``; the trainer's log-probabilities are transformers' own.
    """
    encoder = PromptEncoder(policy, system_prompt=SYSTEM_PROMPT)
    images = make_images(folder / "images", SIZES)
    engine = EmbeddedEngine(RolloutConfig(), encoder=encoder, model_path=sampled_by, dtype=torch.float32)
    engine.weight_version = step - 1
    teacher = Transformers(sampled_by, encoder)
    groups = []
    for name, orders in ORDERS.items():
        slots = IMAGES[name]
        record = Record(
            name,
            tuple(images[slot] for slot in slots),
            "<image> " * len(slots) + "What is the sum of all the digits?",
            "7",
            contract=PermutationContract(movable=tuple(range(len(slots)))),
        )
        views = tuple(apply_order(record, order, index) for index, order in enumerate(orders))
        prompts = tuple(encoder.encode(view) for view in views)
        sampling = Sampling(num_rollouts=2, temperature=TEMPERATURE, top_p=top_p, max_tokens=9)
        seeds = [step * 100 + index for index in range(len(views))]
        groups.append(Group(record, views, prompts, engine.generate(views, prompts, sampling, seeds=seeds)))
    loaded = load_config(
        None,
        [
            *(f"model.path={policy}", "model.dtype=float32", f"data.system_prompt={SYSTEM_PROMPT}"),
            *(f"run.directory={folder}", "run.name=run", f"rollout.temperature={TEMPERATURE}"),
            *(f"rollout.top_p={top_p}", *settings),
        ],
    )
    run_folder = RunFolder.create(loaded, resume=False)
    RolloutRecorder(run_folder.rollouts, image_of=encoder.image).record(step, kept=groups)
    run = RecordedRun(run_folder.root, policy, encoder)
    return run.rewrite(lambda row: {"logprob_old": teacher.log_probs(row)})
