"""A group's loss step by TRL's GRPOTrainer: its own class, constructed as its documentation does, on prepared rollouts.

Timed is ``GRPOTrainer.training_step`` of each of its micro-batches, after setting the gradients to None: loss, backward
and the metrics that it always computes. What is left out is sampling, rewards and the optimizer. The rollouts are
handed over where the trainer itself keeps those of a step that is made several times (``num_iterations``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group_step_cases import Case, make_encoder, make_group
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perl_megatron.checkpoint.qwen25_vl_table import published_name
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.train.batch import TrainingSequence

MODULES = ("trl", "accelerate", "datasets", "pandas")
"""What its trainer imports and this project does not need."""
INSTALL = "pip install --no-deps -r requirements/trl-trainer.lock"


def missing_modules() -> list[str]:
    """Of ``MODULES``."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


class TrlStep:
    """TRL's loss step of a group.

    Args:
        case: which group.
        folder: of the case's checkpoint and images.
        micro_batches: parts that the group is split into, each ``per_device_train_batch_size`` sequences.
        responses_only: let the output layer score the response tokens alone, as TRL does on a GPU. On a CPU it scores
            the prompt's tokens too, and throws their log-probabilities away.
        dtype: of weights and activations; in bfloat16 without autocast, as ours.
    """

    def __init__(
        self,
        case: Case,
        folder: Path,
        *,
        responses_only: bool,
        micro_batches: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        import trl
        from datasets import Dataset
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        if responses_only:
            trl.trainer.utils._use_triton = lambda device: True
        encoder = make_encoder(folder)
        sequences = make_group(case, folder, encoder)
        policy = folder / "policy"
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy, dtype=dtype, attn_implementation="sdpa")
        settings = trl.GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=len(sequences) // micro_batches,
            gradient_accumulation_steps=micro_batches,
            num_generations=case.rollouts,
            num_iterations=10**9,  # no rollouts of its own
            loss_type="dapo",  # the mean over all tokens
            epsilon=0.2,
            epsilon_high=0.2,
            beta=0.0,
            max_completion_length=max(len(sequence.response) for sequence in sequences),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        )
        self._trainer: Any = trl.GRPOTrainer(
            model=model,
            reward_funcs=_no_reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["unused"] * len(sequences)}),
            processing_class=AutoProcessor.from_pretrained(policy),
        )
        self._trainer.current_gradient_accumulation_steps = micro_batches
        device = self._trainer.accelerator.device
        self._trainer._buffered_inputs = _batches(sequences, encoder, micro_batches, device)
        self._trainer._step = micro_batches  # the first step of an iteration would sample
        self._micro_batches = micro_batches

    def __call__(self) -> float:
        """Forward and backward of the whole group; gives the loss."""
        model = self._trainer.model
        model.zero_grad(set_to_none=True)
        losses = [self._trainer.training_step(model, {}, None) for _ in range(self._micro_batches)]
        return float(sum(losses))

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Published name and gradient of every parameter, after a step."""
        for name, parameter in self._trainer.model.named_parameters():
            yield published_name(name), parameter.grad

    @property
    def new_gradient_bytes(self) -> int:
        """What a step allocates for gradients, which outlive it."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._trainer.model.parameters())


def _no_reward(**unused: Any) -> list[float]:
    raise AssertionError("nothing is sampled here")


def _batches(
    sequences: list[TrainingSequence], encoder: PromptEncoder, number: int, device: torch.device
) -> list[dict[str, Any]]:
    """As the trainer's own ``_prepare_inputs`` leaves them, but not shuffled: views stay together, which pads least."""
    total = torch.tensor(float(sum(len(sequence.response) for sequence in sequences)))
    batches = []
    for part in np.array_split(np.arange(len(sequences)), number):
        batch = _batch([sequences[index] for index in part], encoder) | {"num_items_in_batch": total}
        batches.append({key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()})
    return batches


def _batch(sequences: list[TrainingSequence], encoder: PromptEncoder) -> dict[str, Any]:
    prompts = [torch.from_numpy(sequence.prompt.token_ids) for sequence in sequences]
    responses = [torch.from_numpy(sequence.response) for sequence in sequences]
    old = [torch.from_numpy(sequence.logprob_old) for sequence in sequences]

    def left(rows: list[Tensor], padding: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")

    def right(rows: list[Tensor], padding: int = 0) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    prompt_ids, completion_ids = left(prompts, encoder.pad_token_id), right(responses, encoder.pad_token_id)
    is_image = torch.cat([prompt_ids == encoder.image_token_id, torch.zeros_like(completion_ids, dtype=torch.bool)], 1)
    keys = [key for sequence in sequences for key in sequence.prompt.image_keys]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": left([torch.ones_like(row) for row in prompts], 0),
        "completion_ids": completion_ids,
        "completion_mask": right([torch.ones_like(row) for row in responses]),
        "advantages": torch.tensor([sequence.advantage for sequence in sequences]),
        "old_per_token_logps": right(old),
        "pixel_values": torch.from_numpy(np.concatenate([encoder.patches(key) for key in keys])),
        "image_grid_thw": torch.from_numpy(np.concatenate([sequence.prompt.grids for sequence in sequences])),
        "num_images": [len(sequence.prompt.image_keys) for sequence in sequences],
        "mm_token_type_ids": is_image.int(),
    }
