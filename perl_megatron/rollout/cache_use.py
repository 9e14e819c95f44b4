"""What an engine did not compute again: the rollouts of a view share its prompt, the views of a record its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perl_megatron.types import EncodedPrompt


@dataclass(frozen=True)
class CacheUse:
    """Of some calls of ``generate``, over all engines; each response counts its whole prompt."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    images: int = 0
    encoded_images: int = 0
    """How often the vision tower looked at an image."""

    @classmethod
    def of_prompts(cls, prompts: Sequence[EncodedPrompt], num_rollouts: int) -> CacheUse:
        """What is asked for: nothing cached, nothing encoded yet."""
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        return cls(tokens * num_rollouts, 0, sum(len(prompt.image_keys) for prompt in prompts) * num_rollouts, 0)

    def __add__(self, other: CacheUse) -> CacheUse:
        return CacheUse(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.images + other.images,
            self.encoded_images + other.encoded_images,
        )

    def metrics(self) -> dict[str, float]:
        """Hit rates; none of what was not asked for."""
        rates = {}
        if self.prompt_tokens:
            rates["rollout/prefix_hit_rate"] = self.cached_tokens / self.prompt_tokens
        if self.images:
            rates["rollout/image_hit_rate"] = 1 - self.encoded_images / self.images
        return rates
