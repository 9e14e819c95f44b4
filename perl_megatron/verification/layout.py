"""What `perl-megatron verify` checks: a layout, on a tiny Qwen2.5-VL whose sizes are written here. No torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive
from perl_megatron.config.schema import Config, ParallelConfig
from perl_megatron.errors import UserError

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 300, 303, 301, 302
TEXT = {
    "vocab_size": 331,  # odd: tensor parallelism has to fill it up
    "hidden_size": 192,
    "intermediate_size": 208,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "depth": 3,
    "hidden_size": 320,
    "intermediate_size": 120,
    "num_heads": 8,
    "window_size": 56,
    "out_hidden_size": 192,
    "fullatt_block_indexes": [1],
}
"""Widths and head counts differ pairwise, so that a mix-up cannot pass; tensor-parallel sizes 2 and 4 divide them. A
head's width is a multiple of 8 (16 and 40), as the fused attention of GPUs needs it."""

NUM_LAYERS = 4
"""Two pipeline stages of two virtual stages each divide it; stages of unequal length may need more (`--layers`)."""

MICRO_BATCH_TOKENS = 220
"""So that a step has several micro-batches: one of them with views of the same images, one without images."""

TIMEOUT_SECONDS = 300.0
"""Of each collective; so long at most do the other processes wait for rank 0's reference."""

OPTIONS = {
    "tensor": "--tp",
    "pipeline": "--pp",
    "virtual_pipeline": "--vpp",
    "context": "--cp",
    "data": "--dp",
    "sequence": "--sp",
    "vision": "--vision",
    "first_stage_layers": "--first-stage-layers",
    "last_stage_layers": "--last-stage-layers",
}
"""Field of `parallel` → option of the command."""


@dataclass(frozen=True)
class Layout:
    """A way to lay the tiny policy out over processes, and how it computes."""

    parallel: Mapping[str, int | bool | str]
    """Fields of the configuration's `parallel` that are not their defaults."""
    tied: bool = False
    """Whether the output layer is the embedding (as in the published 3B model)."""
    recompute: str = "none"
    dtype: str = "float32"
    num_layers: int = NUM_LAYERS
    """Of the language model."""

    @classmethod
    def of(cls, parallel: Mapping[str, int | bool | str], **others: Any) -> Layout:
        """A layout of these sizes, without those that are their fields' defaults."""
        plain = ParallelConfig(data=1).model_dump()
        return cls({name: value for name, value in parallel.items() if value != plain[name]}, **others)

    def __str__(self) -> str:
        sizes = [name if value is True else f"{name} {value}" for name, value in self.parallel.items()]
        how = [self.dtype, "tied" if self.tied else "untied"]
        how += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        how += [f"{self.num_layers} layers"] if self.num_layers != NUM_LAYERS else []
        return f"{' × '.join(sizes) or 'one process'}, {', '.join(how)}".replace("_", " ")

    def elsewhere(self, parallel: Mapping[str, int | bool | str]) -> Layout:
        """The same policy over other sizes."""
        others = {"tied": self.tied, "recompute": self.recompute, "dtype": self.dtype, "num_layers": self.num_layers}
        return Layout.of(parallel, **others)

    def config(self, policy: Path) -> Config:
        """The configuration of a run on the folder ``policy``.

        The optimizer's numbers make one step visible: it moves weights by up to a twentieth, and the gradient is always
        clipped. In float32 it depends smoothly on small gradients (Adam's ε is of their size); in lower precision it
        moves every weight by more than the rounding.
        """
        return Config.model_validate(
            {
                "model": {"path": policy, "dtype": self.dtype, "recompute": self.recompute},
                "parallel": {"data": 1, **self.parallel},
                "rollout": {"engine": "embedded"},
                "algorithm": {"kl_coefficient": 0.0},
                "optimizer": {
                    "learning_rate": 0.05,
                    "epsilon": 1e-3 if self.dtype == "float32" else 1e-8,
                    "weight_decay": 0.1,
                    "clip_gradient": 0.5,
                },
                # Context ranks, which have no shared prompts, run the other layout.
                "actor": {
                    "sharing": "full" if self.parallel.get("context", 1) == 1 else "vision",
                    "micro_batch_tokens": MICRO_BATCH_TOKENS,
                },
            }
        )

    def check(self, world_size: int) -> None:
        """Raise UserError where the layout cannot run on so many processes."""
        with tempfile.TemporaryDirectory(prefix="perl-megatron-verify-") as folder:
            config = json.dumps(policy_config(self.tied, self.num_layers))
            (Path(folder) / "config.json").write_text(config, encoding="utf-8")
            numbers = read_architecture_numbers(folder)
            derive(self.config(Path(folder)), world_size=world_size, architecture=numbers, command="sft")

    def other(self, world_size: int) -> Layout:
        """A layout to reshard to: data-parallel only, else one of the others that fit; itself where none does."""
        for name in ("data", "tensor", "pipeline"):
            candidate = self.elsewhere({name: world_size})
            try:
                candidate.check(world_size)
            except UserError:
                continue
            if candidate != self:
                return candidate
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def policy_config(tied: bool, num_layers: int) -> dict[str, Any]:
    """The `config.json` of the tiny policy."""
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {**TEXT, "num_hidden_layers": num_layers},
        "vision_config": VISION,
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tied,
    }
