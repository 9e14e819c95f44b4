"""Requests for rollouts, and what may come back: vLLM's `/inference/v1/generate`, token ids in and token ids out.

A server's answer is not trusted: whatever is not exactly the rollouts that were asked for raises ``ServerFailure``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from perl_megatron.data.cache import ByteBoundedCache
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.rollout.engine import Sampling
from perl_megatron.rollout.server_client import ServerFailure, describe
from perl_megatron.rollout.vllm_sampling import sampling_settings
from perl_megatron.types import EncodedPrompt, Rollout, View

GENERATE = "inference/v1/generate"
MIN_LOG_PROBABILITY = -1e38
"""float32 has no smaller ones."""
MAX_LOG_PROBABILITY = 1e-3
"""A rounded log-probability may be above zero, by less than this."""


class StaleWeights(ServerFailure):
    """The server sampled with other weights than it was brought: it was restarted."""


class ImageUrls:
    """Images as requests carry them, by content hash; those used last are kept, as views of a record share them."""

    def __init__(self, encoder: PromptEncoder, *, cache_bytes: int = 64 * 2**20):
        self._encoder = encoder
        self._kept: ByteBoundedCache[str] = ByteBoundedCache(cache_bytes)

    def __call__(self, key: str) -> str:
        """A data URL without loss (PNG): engine and trainer see the same pixels."""
        url = self._kept.get(key)
        if url is None:
            buffer = io.BytesIO()
            self._encoder.image(key).save(buffer, "PNG", compress_level=1)
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
            self._kept.put(key, url, num_bytes=len(url))
        return url


def request_body(
    encoder: PromptEncoder, prompt: EncodedPrompt, sampling: Sampling, seed: int, url_of: Callable[[str], str]
) -> dict[str, Any]:
    """The request for all rollouts of a view. The same body gives the same rollouts, whichever server answers it.

    ``url_of`` gives an image by its content hash: ``ImageUrls``.
    """
    settings = sampling_settings(encoder, sampling, seed)
    settings["logit_bias"] = {str(token): bias for token, bias in settings["logit_bias"].items()}  # as JSON has keys
    return {
        "token_ids": list(prompt.compact_ids),  # one image-pad id for each image: vLLM expands them itself
        "content_parts": [{"type": "image_url", "url": url_of(key)} for key in prompt.image_keys],
        "return_token_ids": True,
        "sampling_params": settings,
    }


@dataclass(frozen=True)
class AnswerReader:
    """Reads the answers to requests for rollouts of one sampling.

    Args:
        encoder: of the policy.
        sampling: what was asked for.
        version_of: knows the weights that a server may have sampled with, by the name they were given; None for others.
    """

    encoder: PromptEncoder
    sampling: Sampling
    version_of: Callable[[str], int | None]

    def read(self, answer: Any, view: View, prompt: EncodedPrompt) -> list[Rollout]:
        """The rollouts in an answer, in their order.

        Raises:
            StaleWeights: some token was sampled with other weights.
            ServerFailure: it is not an answer to this request.
        """
        try:
            if answer["prompt_token_ids"] != prompt.token_ids.tolist():
                raise ServerFailure(
                    "it read another prompt than it was sent (was it started with other data.min_pixels, "
                    "data.max_pixels?)"
                )
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != self.sampling.num_rollouts:
                raise ServerFailure(f"it returned {len(choices)} rollouts instead of {self.sampling.num_rollouts}")
            if any(choice["index"] != number for number, choice in enumerate(choices)):
                numbers = ", ".join(str(choice["index"])[:20] for choice in choices)
                raise ServerFailure(f"it returned rollouts that are numbered {numbers}")
            return [self._rollout(choice, view) for choice in choices]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ServerFailure(f"its answer cannot be read: {describe(error)}") from error

    def _rollout(self, choice: dict[str, Any], view: View) -> Rollout:
        tokens, reason = choice["token_ids"], choice["finish_reason"]
        if not all(type(token) is int and 0 <= token < self.encoder.vocabulary_size for token in tokens):
            raise ServerFailure("it returned token ids that the policy does not have")
        is_ended = bool(tokens) and tokens[-1] in self.encoder.end_token_ids
        length_fits = 1 <= len(tokens) <= self.sampling.max_tokens
        expected = "stop" if is_ended else "length"
        if not length_fits or reason != expected or (not is_ended and len(tokens) != self.sampling.max_tokens):
            raise ServerFailure(f"it ended a response of {len(tokens)} tokens with {reason!r}, which does not fit it")
        token_ids = np.array(tokens, dtype=np.int64)
        return Rollout(
            view_index=view.index,
            token_ids=token_ids,
            logprob_rollout=_log_probs(choice["logprobs"]["content"], tokens),
            finish_reason=reason,
            text=self.encoder.decode(token_ids),
            weight_versions=self._versions(choice["weight_versions"], len(tokens)),
        )

    def _versions(self, spans: Any, num_tokens: int) -> np.ndarray:
        """int64 [R], from vLLM's spans of tokens that the same weights sampled."""
        versions = np.full(num_tokens, -1, dtype=np.int64)
        for span in spans:
            version = self.version_of(str(span["version"]))
            if version is None:
                raise StaleWeights(f"it sampled with the weights {span['version']!r}, which it was not brought")
            versions[int(span["start"]) : int(span["end"])] = version
        if (versions < 0).any():
            raise ServerFailure("it does not say which weights sampled some of the tokens")
        return versions


def _log_probs(scores: Any, tokens: list[int]) -> np.ndarray:
    """float32 [R]."""
    if [score["token_id"] for score in scores] != tokens:
        raise ServerFailure("its log-probabilities are of other tokens")
    values = [float(score["logprob"]) for score in scores]
    if not all(MIN_LOG_PROBABILITY <= value <= MAX_LOG_PROBABILITY for value in values):  # false for NaN
        raise ServerFailure("it returned log-probabilities that are none")
    return np.array(values, dtype=np.float32)
