"""One small training case for the actor's tests: a tiny policy, several groups, a float64 transformers reference."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.types import IMAGE_PLACEHOLDER, View

TOOL = Path(__file__).parents[1] / "tools" / "make_tiny_policy.py"
IMAGE_SIZES = [(28, 28), (56, 84), (28, 56), (112, 140)]
ODD_SIZES = [(28, 28)] * 32 + [(28, 560), (560, 28), (280, 280)]
ODD_VIEWS = {
    "none": [[]],
    "one": [[0]],
    "many": [list(range(32))],
    "sizes": [[0, 32, 34, 33, 1]],
    "mixed": [[34], list(range(32)), [], [5], [0, 32, 34, 33, 1], [32], [], [], [], [], []],
}
"""Views by indices into ``ODD_SIZES``."""
TEMPERATURE = 0.8
GRADIENT_STEP = {"learning_rate": 1e13, "epsilon": 1e9, "weight_decay": 0.0, "clip_gradient": 0.0}
"""With these an Adam step moves every weight by -10,000 times its gradient, so that the weights show the gradient."""
GRADIENT_SCALE = -1e4


def make_case(folder: Path, *, layers: int = 2, vision_depth: int = 2, tie: bool = False) -> None:
    """A policy and images under ``folder``; from a ``vision_depth`` of 4 on some blocks attend over windows."""
    tool = _tiny_policy_tool()
    tool.make_tiny_policy(folder / "policy", tool.TinyShape(layers=layers, vision_depth=vision_depth, tie=tie), seed=3)
    _widen(folder / "policy" / "model.safetensors")
    random = np.random.default_rng(5)
    (folder / "images").mkdir()
    images = {f"{index}": size for index, size in enumerate(IMAGE_SIZES)}
    images |= {f"odd-{index}": size for index, size in enumerate(ODD_SIZES)}
    for name, size in images.items():
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")


def _tiny_policy_tool() -> ModuleType:
    """tools/make_tiny_policy.py; tools/ is not a package."""
    name = "tools_make_tiny_policy"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TOOL)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _widen(file: Path) -> None:
    """Widen the matrices, so that distributions are far from flat, and move norms and biases off 1 and 0."""
    random = np.random.default_rng(4)
    weights = {
        name: value * (8 if name == "lm_head.weight" else 2)
        if value.ndim >= 2
        else value + 0.1 * random.normal(size=value.shape).astype(np.float32)
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def make_config(folder: Path, *, parallel: Mapping[str, Any] = {}, **sections: Mapping[str, Any]) -> Config:
    optimizer = {"learning_rate": 1e-4, "epsilon": 1e-4, **sections.get("optimizer", {})}
    sharing = "vision" if parallel.get("context", 1) > 1 else "full"
    return Config.model_validate(
        {
            "model": {"path": folder / "policy", "dtype": "float32", **sections.get("model", {})},
            "rollout": {"temperature": TEMPERATURE},
            "algorithm": {"kl_coefficient": 0.05, **sections.get("algorithm", {})},
            "actor": {"micro_batch_tokens": 160, "sharing": sharing, **sections.get("actor", {})},
            "optimizer": optimizer,
            "parallel": dict(parallel),
            "run": dict(sections.get("run", {})),
        }
    )


def make_encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder(folder / "policy", system_prompt="Think first.")


def make_sequences(folder: Path, encoder: PromptEncoder, *, seed: int = 0) -> list[TrainingSequence]:
    """13 responses to five views of three questions (one without images), each of another length and advantage."""
    images = [folder / "images" / f"{index}.png" for index in range(len(IMAGE_SIZES))]
    random = np.random.default_rng(seed)
    views = [[0, 1], [1, 0], [2, 3, 0], [0, 2, 3], []]
    prompts = [encoder.encode(_view([images[slot] for slot in view])) for view in views]
    allowed = np.setdiff1d(np.arange(encoder.vocabulary_size), encoder.banned_token_ids)
    return [
        TrainingSequence(
            prompt=prompts[min(index // 3, 4)],
            response=random.choice(allowed, size=1 + (5 * index) % 9).astype(np.int64),
            advantage=float(random.normal()),
        )
        for index in range(13)
    ]


def make_odd_sequences(folder: Path, encoder: PromptEncoder, kind: str) -> list[TrainingSequence]:
    """One response to each of ``ODD_VIEWS[kind]``."""
    random = np.random.default_rng(7)
    allowed = np.setdiff1d(np.arange(encoder.vocabulary_size), encoder.banned_token_ids)
    return [
        TrainingSequence(
            prompt=encoder.encode(_view([folder / "images" / f"odd-{index}.png" for index in view])),
            response=random.choice(allowed, size=3 + index % 4).astype(np.int64),
            advantage=float(random.normal()),
        )
        for index, view in enumerate(ODD_VIEWS[kind])
    ]


def _view(images: Sequence[Path]) -> View:
    text = f"{IMAGE_PLACEHOLDER} " * len(images) + "Which digit is in image 1?"
    return View("record", 0, tuple(range(len(images))), tuple(images), text, "7", "number")


def with_log_probs(
    sequences: Sequence[TrainingSequence], old: Sequence[np.ndarray], ref: Sequence[np.ndarray], *, noise: float = 0.0
) -> list[TrainingSequence]:
    """The sequences with log π_old (off by some noise, so that all clip bounds are met) and log π_ref."""
    random = np.random.default_rng(1)
    return [
        replace(
            sequence,
            logprob_old=(a + noise * random.normal(size=a.shape)).astype(np.float32),
            logprob_ref=(b + noise * random.normal(size=b.shape)).astype(np.float32),
        )
        for sequence, a, b in zip(sequences, old, ref, strict=True)
    ]


class Reference:
    """The same policy in transformers, one unpadded sequence at a time, and losses written out plainly."""

    def __init__(self, folder: Path, encoder: PromptEncoder, dtype: torch.dtype = torch.float64):
        import transformers

        self.encoder, self.dtype = encoder, dtype
        self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "policy", attn_implementation="eager", dtype=dtype
        )

    def log_prob(self, sequence: TrainingSequence) -> torch.Tensor:
        """[R], differentiable."""
        prompt = sequence.prompt
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, sequence.response]))[None]
        images: dict[str, Any] = {}
        if len(prompt.image_keys):
            patches = np.concatenate([self.encoder.patches(key) for key in prompt.image_keys])
            images = {
                "pixel_values": torch.from_numpy(patches).to(self.dtype),
                "image_grid_thw": torch.from_numpy(prompt.grids),
                "mm_token_type_ids": (ids == self.encoder.image_token_id).int(),
            }
        logits = self.model(input_ids=ids, use_cache=False, **images).logits[0, len(prompt.token_ids) - 1 : -1]
        bias = torch.zeros(logits.shape[-1], dtype=self.dtype)
        bias[list(self.encoder.banned_token_ids)] = -100.0
        log_probs = ((logits + bias) / TEMPERATURE).log_softmax(-1)
        return log_probs.gather(-1, torch.from_numpy(sequence.response)[:, None])[:, 0]

    def policy_loss(self, sequences: Sequence[TrainingSequence], config: Config) -> torch.Tensor:
        """GRPO's loss from its definition: min and clip, dual clip, β · k3; mean by token or by sequence."""
        algorithm = config.algorithm
        per_sequence = []
        for sequence in sequences:
            log_prob = self.log_prob(sequence)
            assert sequence.logprob_old is not None
            assert sequence.logprob_ref is not None
            ratio = (log_prob - torch.from_numpy(sequence.logprob_old).to(self.dtype)).exp()
            advantage = sequence.advantage
            clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
            objective = torch.minimum(ratio * advantage, clipped * advantage)
            if advantage < 0 and algorithm.dual_clip is not None:
                objective = objective.clamp(min=algorithm.dual_clip * advantage)
            log_r = torch.from_numpy(sequence.logprob_ref).to(self.dtype) - log_prob
            per_sequence.append(-objective + algorithm.kl_coefficient * (log_r.exp() - 1 - log_r))
        if algorithm.aggregation == "token":
            return torch.cat(per_sequence).mean()
        return torch.stack([losses.mean() for losses in per_sequence]).mean()

    def supervised_loss(self, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
        return -torch.cat([self.log_prob(sequence) for sequence in sequences]).mean()

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters under the published checkpoints' names."""
        for name, parameter in self.model.named_parameters():
            yield name.replace("model.language_model.", "model.").replace("model.visual.", "visual."), parameter


def gradient(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float64: the gradient that one step with ``GRADIENT_STEP`` took."""
    return {name: (after[name].astype(np.float64) - before[name]) / GRADIENT_SCALE for name in before}


def norm(gradients: Mapping[str, np.ndarray]) -> float:
    """2-norm over all tensors."""
    return float(np.sqrt(sum((value**2).sum() for value in gradients.values())))


def weights_of(actor: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in actor.weights()}


def worst_relative_error(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Largest ‖a - e‖ / ‖e‖ over all tensors."""
    assert actual.keys() == expected.keys()
    return max(
        float(np.linalg.norm(actual[name].astype(np.float64) - value) / np.linalg.norm(value))
        for name, value in expected.items()
    )
