"""transformers' log-probabilities of recorded responses: right input or wrong, right weights or wrong, any precision.

One rollout at a time, whole, without a cache of keys and values. Legend: P prompt tokens, R response tokens, S = P + R,
H hidden size, V vocabulary, K alternatives of a log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER, published_name
from perl_megatron.errors import UserError
from perl_megatron.kernels.scores import BANNED_BIAS
from perl_megatron.runtime import platform
from perl_megatron.triage.cases import ImageInput, ModelInput
from perl_megatron.triage.policies import EMBEDDINGS, OUTPUT, Mix, Policy, group_of
from perl_megatron.types import EncodedPrompt

platform.install()  # before transformers imports torchvision

import transformers  # noqa: E402

Precision = Literal["float64", "float32", "bfloat16", "float8"]
"""'float8' is bfloat16 with the products of the language model's layers in e4m3, scaled by tensor."""

LAYERS = "model.language_model.layers."
ROWS_AT_ONCE = 256
"""So many tokens have their V logits in memory."""


@dataclass(frozen=True)
class Distribution:
    """What responses are sampled from."""

    temperature: float
    top_p: float
    """Of the engine alone: the trainer scores the whole distribution."""
    banned_token_ids: Sequence[int]
    """Tokens that get ``BANNED_BIAS`` before the temperature."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of one response, float64."""

    trainer: np.ndarray
    """[R, 1]: of the whole distribution."""
    engine: np.ndarray
    """[R, K]: after top-p. Rounding may move a token over the nucleus's border, so beside it there are those of one
    token less and one more; -inf where the nucleus does not hold the token. K is 1 without top-p."""


class Reference:
    """transformers' Qwen2.5-VL in one precision; ``use`` weights first.

    Args:
        model_path: the Hugging Face folder that describes the model.
        precision: of everything that is computed.
        weights_dtype: weights are rounded to this first, as the run holds them.
        distribution: of the sampling.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        precision: Precision,
        weights_dtype: torch.dtype,
        distribution: Distribution,
    ):
        open_checkpoint(model_path)  # refuses what is damaged, and an index that leads transformers out of the folder
        transformers.utils.logging.disable_progress_bar()
        self._is_8_bit = precision == "float8"
        self._dtype = torch.bfloat16 if precision == "float8" else getattr(torch, precision)
        self._weights_dtype, self._distribution = weights_dtype, distribution
        self._device = platform.device()
        model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_path, dtype=self._dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._tied = bool(model.config.tie_word_embeddings)
        self._in_memory = {published_name(name): name for name, _ in model.named_parameters()}
        self._parameters = {published_name(name): tensor for name, tensor in model.named_parameters()}
        if self._tied:
            self._parameters.pop(OUTPUT_LAYER, None)
        self._held: dict[str, Policy] = {}
        self._output = model.lm_head.weight
        self._features: dict[str, Tensor] = {}
        if self._is_8_bit:
            for module in model.model.language_model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(lambda _, inputs: (round_to_8_bit(inputs[0]), *inputs[1:]))

    def use(self, mix: Mix) -> None:
        """Take each group's weights from its policy. Raises UserError for weights that are not of this model."""
        for policy in dict.fromkeys(mix.values()):
            for name in policy.weights:
                tensor = self._parameters.get(name)
                if tensor is None or mix[group_of(name)] is not policy or self._held.get(name) is policy:
                    continue
                stored = self._read(policy, name, tensor.shape)
                is_8_bit = self._is_8_bit and self._in_memory[name].startswith(LAYERS) and tensor.dim() == 2
                tensor.copy_(round_to_8_bit(stored) if is_8_bit else stored)
                self._held[name] = policy
                if name.startswith("visual."):
                    self._features.clear()
        missing = [name for name in self._parameters if self._held.get(name) is not mix[group_of(name)]]
        if missing:
            where = str(mix[group_of(missing[0])].weights.path)
            raise UserError(f"the checkpoint lacks {', '.join(missing[:3])} of the run's model", where=where)
        if self._tied:
            embedding = self._parameters[EMBEDDING]
            alike = mix[OUTPUT] is mix[EMBEDDINGS]
            self._output = embedding if alike else self._read(mix[OUTPUT], EMBEDDING, embedding.shape)

    def positions(self, prompt: EncodedPrompt, response: np.ndarray) -> np.ndarray:
        """int64 [3, S]: transformers' own; response tokens are text, whatever their ids."""
        length = len(prompt.token_ids) + len(response)
        if not prompt.image_starts:
            return np.broadcast_to(np.arange(length), (3, length))
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, response]))[None]
        positions, _ = self._model.model.get_rope_index(
            ids,
            mm_token_type_ids=torch.from_numpy(_is_image(prompt, length)).int()[None],
            image_grid_thw=torch.from_numpy(prompt.grids),
        )
        return positions[:, 0].numpy()

    @torch.no_grad()
    def score(self, inputs: ModelInput) -> Scores:
        """The log-probability of each response token after the prompt and the tokens before it."""
        prompt, response = inputs.prompt, inputs.response
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, response])).to(self._device)
        embeds_SH = self._model.get_input_embeddings()(ids)
        if inputs.images:
            mask = torch.from_numpy(_is_image(prompt, len(ids))).to(self._device)
            features = torch.cat([self._image(each) for each in inputs.images])
            embeds_SH = embeds_SH.masked_scatter(mask[:, None], features)
        positions = self.positions(prompt, response) if inputs.positions is None else inputs.positions
        hidden_SH = self._model.model.language_model(
            inputs_embeds=embeds_SH[None],
            attention_mask=torch.ones_like(ids)[None],
            position_ids=torch.from_numpy(np.ascontiguousarray(positions)).to(self._device)[:, None],
            use_cache=False,
        ).last_hidden_state[0]
        first = len(prompt.token_ids) - 1 + inputs.late
        hidden_RH = hidden_SH[first : first + len(response)]
        parts = [
            self._log_probs(hidden_RH[start : start + ROWS_AT_ONCE], response[start : start + ROWS_AT_ONCE])
            for start in range(0, len(response), ROWS_AT_ONCE)
        ]
        trainer, engine = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
        return Scores(_roll(trainer, inputs.rolled), _roll(engine, inputs.rolled))

    def _log_probs(self, hidden_RH: Tensor, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits_RV = hidden_RH @ self._output.T
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        logits_RV[:, list(self._distribution.banned_token_ids)] += BANNED_BIAS
        log_probs_RV = (logits_RV / self._distribution.temperature).log_softmax(dim=-1)
        tokens_R1 = torch.from_numpy(response).to(self._device)[:, None]
        chosen_R1 = log_probs_RV.gather(1, tokens_R1).double()
        if self._distribution.top_p == 1:
            return chosen_R1.cpu().numpy(), chosen_R1.cpu().numpy()
        return chosen_R1.cpu().numpy(), _nucleus(log_probs_RV, tokens_R1, self._distribution.top_p).cpu().numpy()

    def _image(self, image: ImageInput) -> Tensor:
        """Merged features [t·h·w / 4, H]."""
        if image.key not in self._features:
            output = self._model.model.get_image_features(
                torch.from_numpy(image.patches).to(self._device, self._dtype),
                torch.tensor([image.grid], device=self._device),
            )
            self._features[image.key] = output.pooler_output[0]
        return self._features[image.key]

    def _read(self, policy: Policy, name: str, shape: torch.Size) -> Tensor:
        """In this precision, after rounding to the dtype that the run holds it in."""
        stored = policy.weights[name]
        if stored.shape != shape:
            where = str(policy.weights.path)
            raise UserError(f"tensor {name} is {tuple(stored.shape)}, the run's model has {tuple(shape)}", where=where)
        return stored.to(self._weights_dtype).to(self._device, self._dtype)


def round_to_8_bit(tensor: Tensor) -> Tensor:
    """To e4m3, with the scale that brings its largest number to the end of the range."""
    scale = (tensor.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-30)
    return ((tensor / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)


def _nucleus(log_probs_RV: Tensor, tokens_R1: Tensor, top_p: float) -> Tensor:
    """float64 [R, 3]: with the smallest nucleus of mass ``top_p``, with one token less, and with one more."""
    sorted_RV, order_RV = log_probs_RV.double().sort(dim=-1, descending=True)
    mass_RV = sorted_RV.exp().cumsum(dim=-1)
    last_R1 = (mass_RV < top_p).sum(dim=-1, keepdim=True).clamp(max=mass_RV.shape[1] - 1)
    rank_R1 = (order_RV == tokens_R1).int().argmax(dim=-1, keepdim=True)
    lasts_RK = (last_R1 + torch.tensor([0, -1, 1], device=last_R1.device)).clamp(0, mass_RV.shape[1] - 1)
    values_RK = log_probs_RV.double().gather(1, tokens_R1) - mass_RV.gather(1, lasts_RK).log()
    return values_RK.masked_fill(rank_R1 > lasts_RK, float("-inf"))


def _is_image(prompt: EncodedPrompt, length: int) -> np.ndarray:
    """bool [S]: the tokens that image features fill."""
    is_image = np.zeros(length, dtype=bool)
    for start, grid in zip(prompt.image_starts, prompt.grids, strict=True):
        is_image[start : start + int(grid.prod()) // 4] = True
    return is_image


def _roll(values: np.ndarray, by: int) -> np.ndarray:
    """Rows moved on by ``by``; NaN where nothing is known."""
    rolled = np.roll(values, by, axis=0)
    if by > 0:
        rolled[:by] = np.nan
    elif by < 0:
        rolled[by:] = np.nan
    return rolled
