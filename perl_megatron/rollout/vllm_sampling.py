"""How vLLM is asked to sample: the same in the trainer's processes and in a server."""

from __future__ import annotations

from typing import Any

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.rollout.engine import BANNED_LOGIT_BIAS, Sampling
from perl_megatron.runtime import rng


def sampling_settings(encoder: PromptEncoder, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The fields of vLLM's ``SamplingParams`` for all rollouts of a view, whose 64-bit seed is ``seed``."""
    return {
        "n": sampling.num_rollouts,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
        "max_tokens": sampling.max_tokens,
        # vLLM adds the rollout's number: neighbouring seeds would share streams, and the sum must fit 63 bits.
        "seed": rng.derive_seed(seed, "rollouts") >> 1,
        "logprobs": 0,  # that of the sampled token, nothing else
        "logit_bias": dict.fromkeys(encoder.banned_token_ids, BANNED_LOGIT_BIAS),
        "stop_token_ids": list(encoder.end_token_ids),
        "detokenize": False,
    }
