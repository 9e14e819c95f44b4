"""The embedded engine: transformers' model in the trainer's process. Nothing to install, and the numerical reference.

An image runs through the vision tower once, a prompt once; its rollouts continue from the shared key-value cache. Each
rollout has its own random stream, keyed by (view seed, rollout number): it does not depend on what else is in the batch
or on the number of ranks, but for float rounding, and the same call gives the same bits. Every rank holds the whole
model and takes every ``world_size``-th view.

Shapes: B prompts, S longest prompt, N sequences, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.qwen25_vl_table import published_name
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.model.mrope import position_ids
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.rollout.digest import digest_weights
from perl_megatron.rollout.engine import Sampling, SyncReport
from perl_megatron.rollout.ledger import WeightLedger
from perl_megatron.rollout.sampling import draw, log_distribution
from perl_megatron.runtime import collective, platform, rng
from perl_megatron.types import EncodedPrompt, Rollout, View

platform.install()  # before transformers imports torchvision

import transformers  # noqa: E402

MAX_VISION_PATCHES = 8192
"""Images go through the vision tower in portions of at most so many patches (or one image)."""


@dataclass
class _Sequence:
    """One response in the making."""

    view: int
    """Index into the call's views."""
    uniforms: np.ndarray | None
    """float64 [max_tokens]: its random numbers; None for greedy sampling."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False


class EmbeddedEngine:
    """``RolloutEngine`` on transformers' Qwen2.5-VL."""

    name = "embedded"

    def __init__(self, config: RolloutConfig, *, encoder: PromptEncoder, model_path: Path | str, dtype: torch.dtype):
        """Load the checkpoint's weights onto this process's device in ``dtype``."""
        self._encoder = encoder
        self._max_sequences = config.max_concurrent_sequences
        self._device = platform.device()
        self.weight_version = 0
        self._cache_use, self._cached_tokens = CacheUse(), 0
        open_checkpoint(model_path)  # refuses what is damaged, and an index that leads transformers out of the folder
        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._dtype = dtype

    def generate(
        self, views: Sequence[View], prompts: Sequence[EncodedPrompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See ``RolloutEngine``; at most ``max_concurrent_sequences`` are sampled at once on each rank."""
        assert len(views) == len(prompts) == len(seeds)
        mine = list(range(collective.rank(), len(views), collective.world_size()))
        with torch.no_grad():
            sampled = self._sample_views(mine, prompts, sampling, seeds)
        use = CacheUse.of_prompts([prompts[view] for view in mine], sampling.num_rollouts)
        encoded_images = len({key for view in mine for key in prompts[view].image_keys})
        use = replace(use, cached_tokens=self._cached_tokens, encoded_images=encoded_images)
        gathered = collective.gather_objects(([sampled[view] for view in mine], use))
        self._cache_use = sum((use for _, use in gathered), self._cache_use)
        by_view = collective.interleave([share for share, _ in gathered], len(views))
        return [
            self._rollout(view, tokens, log_probs)
            for view, responses in zip(views, by_view, strict=True)
            for tokens, log_probs in responses
        ]

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Copy the stream into the model; see ``RolloutEngine``."""
        self.wake()
        own = self._weights()
        ledger = WeightLedger(own.keys(), dtype=self._dtype)
        with torch.no_grad():
            for name, tensor in ledger.watch(weights):
                if tensor.shape != own[name].shape:
                    raise ValueError(f"weight {name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
                own[name].copy_(tensor)
        self.weight_version = version
        return ledger.close(version)

    def take_cache_use(self) -> CacheUse:
        """See ``RolloutEngine``; a batch computes each prompt once."""
        use, self._cache_use = self._cache_use, CacheUse()
        return use

    def sleep(self) -> None:
        """Move the model to host memory (on a CPU it is there)."""
        self._model.to("cpu")

    def wake(self) -> None:
        """Move the model to its device."""
        self._model.to(self._device)

    def digest(self) -> str:
        """Digest of the model's parameters as they are."""
        weights = self._weights()
        return digest_weights(weights, weights.__getitem__, dtype=self._dtype)

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def _weights(self) -> dict[str, torch.Tensor]:
        """The model's weights by their published names; a tied output layer is the embedding, not a weight."""
        tied = self._model.config.tie_word_embeddings
        weights = {published_name(name): tensor for name, tensor in self._model.state_dict().items()}
        return {name: tensor for name, tensor in weights.items() if not (tied and name == "lm_head.weight")}

    def _rollout(self, view: View, tokens: list[int], log_probs: list[float]) -> Rollout:
        stopped = tokens[-1] in self._encoder.end_token_ids
        return Rollout(
            view_index=view.index,
            token_ids=np.array(tokens, dtype=np.int64),
            logprob_rollout=np.array(log_probs, dtype=np.float32),
            finish_reason="stop" if stopped else "length",
            text=self._encoder.decode(tokens),
            weight_versions=np.full(len(tokens), self.weight_version, dtype=np.int64),
        )

    def _sample_views(
        self, mine: Sequence[int], prompts: Sequence[EncodedPrompt], sampling: Sampling, seeds: Sequence[int]
    ) -> dict[int, list[tuple[list[int], list[float]]]]:
        """(token ids, log-probabilities) of each rollout of each view in ``mine``."""
        self._cached_tokens = 0
        features = self._vision_features([prompts[view] for view in mine])
        # Prompts of similar length share a batch, so that little is padded.
        ordered = sorted(mine, key=lambda view: (len(prompts[view].token_ids), view))
        pending = [
            self._new_sequence(view, seeds[view], n, sampling) for view in ordered for n in range(sampling.num_rollouts)
        ]
        responses: dict[int, list[tuple[list[int], list[float]]]] = {view: [] for view in mine}
        for start in range(0, len(pending), self._max_sequences):
            batch = pending[start : start + self._max_sequences]
            self._sample_batch(batch, prompts, features, sampling)
            for sequence in batch:
                responses[sequence.view].append((sequence.tokens, sequence.log_probs))
        return responses

    @staticmethod
    def _new_sequence(view: int, seed: int, number: int, sampling: Sampling) -> _Sequence:
        if sampling.temperature == 0:
            return _Sequence(view, None)
        return _Sequence(view, rng.generator(seed, "rollout", number).random(sampling.max_tokens))

    def _sample_batch(
        self,
        batch: list[_Sequence],
        prompts: Sequence[EncodedPrompt],
        features: dict[str, torch.Tensor],
        sampling: Sampling,
    ) -> None:
        """Sample the batch to its end; the sequences are filled in."""
        views = list(dict.fromkeys(sequence.view for sequence in batch))
        lengths = [len(prompts[sequence.view].token_ids) for sequence in batch]
        self._cached_tokens += sum(lengths) - sum(len(prompts[view].token_ids) for view in views)
        rows_N = torch.tensor([views.index(sequence.view) for sequence in batch], device=self._device)
        logits_BV, cache, mask_BS, next_B = self._prefill([prompts[view] for view in views], features)
        cache.batch_select_indices(rows_N)
        logits_NV, mask_NS, position_N = logits_BV[rows_N], mask_BS[rows_N], next_B[rows_N]
        active = batch
        for step in range(sampling.max_tokens):
            tokens_N = self._append_tokens(active, logits_NV, sampling, step)
            unfinished = [index for index, sequence in enumerate(active) if not sequence.finished]
            if not unfinished or step + 1 == sampling.max_tokens:
                return
            if 2 * len(unfinished) <= len(active):  # finished rows are dropped now and then: a copy of the cache
                keep = torch.tensor(unfinished, device=self._device)
                cache.batch_select_indices(keep)
                active = [active[index] for index in unfinished]
                tokens_N, mask_NS, position_N = tokens_N[keep], mask_NS[keep], position_N[keep]
            mask_NS = torch.cat([mask_NS, mask_NS.new_ones(len(active), 1)], dim=1)
            hidden_N1H = self._model.model.language_model(
                inputs_embeds=self._model.get_input_embeddings()(tokens_N[:, None]),
                attention_mask=mask_NS,
                position_ids=(position_N + step).expand(3, -1)[..., None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits_NV = self._model.lm_head(hidden_N1H[:, -1])

    def _append_tokens(
        self, active: list[_Sequence], logits_NV: torch.Tensor, sampling: Sampling, step: int
    ) -> torch.Tensor:
        """Draw one token for each sequence and write it down where the sequence goes on; int64 [N]."""
        log_probs_NV = log_distribution(
            logits_NV,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            banned_token_ids=self._encoder.banned_token_ids,
        )
        uniforms = [sequence.uniforms[step] for sequence in active if sequence.uniforms is not None]
        uniforms_N = torch.tensor(uniforms, dtype=torch.float64, device=self._device) if uniforms else None
        tokens_N = draw(log_probs_NV, uniforms_N)
        chosen = log_probs_NV.gather(1, tokens_N[:, None])[:, 0].tolist()
        for sequence, token, log_prob in zip(active, tokens_N.tolist(), chosen, strict=True):
            if not sequence.finished:
                sequence.tokens.append(token)
                sequence.log_probs.append(log_prob)
                sequence.finished = token in self._encoder.end_token_ids
        return tokens_N

    def _prefill(
        self, prompts: Sequence[EncodedPrompt], features: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        """Run the left-padded prompts: next-token logits [B, V], cache, mask [B, S], first response position [B]."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        token_ids = torch.full((len(prompts), longest), self._encoder.pad_token_id)
        mask = torch.zeros((len(prompts), longest), dtype=torch.int64)
        positions = torch.zeros((3, len(prompts), longest + 1), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            pad = longest - len(prompt.token_ids)
            token_ids[row, pad:] = torch.from_numpy(prompt.token_ids)
            mask[row, pad:] = 1
            positions[:, row, pad:] = torch.from_numpy(position_ids(prompt, 1))
        token_ids, mask, positions = (tensor.to(self._device) for tensor in (token_ids, mask, positions))
        embeds_BSH = self._model.get_input_embeddings()(token_ids)
        keys = [key for prompt in prompts for key in prompt.image_keys]
        if keys:
            is_image = (token_ids == self._encoder.image_token_id)[..., None]
            embeds_BSH = embeds_BSH.masked_scatter(is_image, torch.cat([features[key] for key in keys]))
        cache = transformers.DynamicCache(config=self._model.config.get_text_config())
        hidden_BSH = self._model.model.language_model(
            inputs_embeds=embeds_BSH,
            attention_mask=mask,
            position_ids=positions[..., :-1],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden_BSH[:, -1]), cache, mask, positions[0, :, -1]

    def _vision_features(self, prompts: Iterable[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """Merged features [t·h·w / 4, H] of each different image, by its key."""
        grids = {key: grid for prompt in prompts for key, grid in zip(prompt.image_keys, prompt.grids, strict=True)}
        features: dict[str, torch.Tensor] = {}
        portion: list[str] = []
        num_patches = 0
        for key, grid in grids.items():
            if portion and num_patches + int(grid.prod()) > MAX_VISION_PATCHES:
                features |= self._run_vision(portion, grids)
                portion, num_patches = [], 0
            portion.append(key)
            num_patches += int(grid.prod())
        return features | self._run_vision(portion, grids) if portion else features

    def _run_vision(self, keys: Sequence[str], grids: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        patches = np.concatenate([self._encoder.patches(key) for key in keys])
        output = self._model.model.get_image_features(
            torch.from_numpy(patches).to(self._device, self._dtype),
            torch.from_numpy(np.stack([grids[key] for key in keys])).to(self._device),
        )
        return dict(zip(keys, output.pooler_output, strict=True))
