"""The numbers of a Qwen2.5-VL policy, read from its Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.errors import UserError


@dataclass(frozen=True)
class VisionArchitecture:
    """The vision tower and its merger."""

    depth: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    """Side of a patch in pixels."""
    temporal_patch_size: int
    """Frames in a patch; a still image is repeated to fill it."""
    merge_size: int
    """Side of a merged cell in patches: a cell is one token of the language model."""
    window_size: int
    """Side of an attention window in pixels."""
    full_attention_blocks: tuple[int, ...]
    """0-based blocks that attend over the whole image."""
    out_hidden_size: int

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: 1176 = 3 · 2 · 14 · 14."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def cells_per_window(self) -> int:
        """Side of an attention window in merged cells."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Architecture:
    """The language model, and the vision tower in ``vision``."""

    vocabulary_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    """How many of the head's half-dimensions turn with time, height and width."""
    max_positions: int
    tied_embeddings: bool
    """Whether the output layer is the embedding (the 3B model) or its own matrix."""
    vision: VisionArchitecture

    @property
    def numbers(self) -> ArchitectureNumbers:
        """What layout and cost depend on."""
        vision = self.vision
        return ArchitectureNumbers(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_size=self.ffn_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocabulary_size=self.vocabulary_size,
            vision_depth=vision.depth,
            vision_hidden_size=vision.hidden_size,
            vision_ffn_size=vision.ffn_size,
            vision_num_heads=vision.num_heads,
            vision_out_hidden_size=vision.out_hidden_size,
            vision_patch_values=vision.patch_values,
            vision_merge_size=vision.merge_size,
            vision_window_patches=(vision.cells_per_window * vision.merge_size) ** 2,
            vision_full_attention_blocks=vision.full_attention_blocks,
            tied_embeddings=self.tied_embeddings,
        )

    def padded_vocabulary(self, tensor_size: int) -> int:
        """The vocabulary's size filled up to a multiple of the tensor-parallel size."""
        return -(-self.vocabulary_size // tensor_size) * tensor_size


def read_architecture(path: Path | str) -> Architecture:
    """Read ``path/config.json``, in the published flat layout or transformers 5's nested one.

    Raises UserError where the file is missing or unreadable, or describes something else than a Qwen2.5-VL that this
    code computes exactly (other rotary types, sliding windows and activations are refused, not approximated).
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError("there is no config.json", where=str(path), fix="give the Hugging Face folder of a Qwen2.5-VL")
    from transformers import PreTrainedConfig, Qwen2_5_VLConfig

    try:
        content, _ = PreTrainedConfig.get_config_dict(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the model's config: {error}", where=str(file)) from error
    if content.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"the model type is {content.get('model_type')!r}, not 'qwen2_5_vl'",
            where=str(file),
            fix="give the Hugging Face folder of a Qwen2.5-VL",
        )
    config = Qwen2_5_VLConfig.from_dict(content)
    _refuse_unknown_variants(config, file)
    text, vision = config.text_config, config.vision_config
    return Architecture(
        vocabulary_size=text.vocab_size,
        hidden_size=text.hidden_size,
        ffn_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        norm_epsilon=text.rms_norm_eps,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        max_positions=text.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        vision=VisionArchitecture(
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            ffn_size=vision.intermediate_size,
            num_heads=vision.num_heads,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            full_attention_blocks=tuple(vision.fullatt_block_indexes),
            out_hidden_size=vision.out_hidden_size,
        ),
    )


def _refuse_unknown_variants(config: Any, file: Path) -> None:
    text, vision = config.text_config, config.vision_config
    expected = {
        "text hidden_act": (text.hidden_act, "silu"),
        "vision hidden_act": (vision.hidden_act, "silu"),
        "rope_type": (text.rope_parameters.get("rope_type"), "default"),
        "use_sliding_window": (bool(text.use_sliding_window), False),
        "attention_dropout": (text.attention_dropout, 0.0),
        "vision out_hidden_size": (vision.out_hidden_size, text.hidden_size),
    }
    for name, (value, known) in expected.items():
        if value != known:
            raise UserError(f"{name} is {value!r}; only {known!r} is supported", where=str(file))
    if "mrope_section" not in text.rope_parameters:
        raise UserError("the rotary parameters have no mrope_section", where=str(file))
