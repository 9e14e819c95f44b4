"""What a micro-batch costs: floating-point operations, and memory of activations. Exact whole numbers on all ranks.

Counted are the matrix products, of which a multiplication with its addition is 2 operations; norms, activations and
rotary turns are some thousandths of them. H, L, F, V: hidden size, layers, feed-forward size and vocabulary of the
language model; Q = heads · head size, K = key-value heads · head size; D, B, E: hidden size, blocks and feed-forward
size of the vision tower; m: side of a merged cell. Forward:

- N tokens behind S others:   L · (N · (2HQ + 4HK + 2QH + 6HF) + 4Q · (N·S + N·(N + 1)/2))
- an image of N patches:      N · (2 · 1176 · D + B · (8D² + 6DE)) + 4D · Σ_blocks N · keys + N/m² · 2m²D · (m²D + H)
- a response token's loss:    2HV

where a patch of a full-attention block has N keys, and of another block those of its window, at most 64 (windows at an
image's edge may be smaller; they are counted whole).

The backward pass of a product takes two products of its size: the gradients of input and weight, or of both factors of
the attention. So it costs twice the forward pass, with two exceptions: pixels need no gradient, and the fused loss
computes its logits again, tile by tile (2HV forward, 6HV backward). Not counted: what ``model.recompute`` repeats, and
what a memory-saving attention kernel does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from perl_megatron.batching.work import ViewWork, distinct_images
from perl_megatron.config.architecture import ArchitectureNumbers

Sharing = Literal["full", "vision", "none"]
"""What the sequences of a micro-batch share.

- ``full``: each distinct image is encoded once, each view's prompt runs once, and the last token of a response is not
  run, because nothing is predicted from it.
- ``vision``: each distinct image is encoded once; prompt and response run for each sequence, in rows that are padded
  to the longest.
- ``none``: like ``vision``, but each image is encoded for each sequence, and as often as its prompt names it.
"""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a micro-batch, by what they are spent on."""

    vision: int = 0
    prompt: int = 0
    response: int = 0
    loss: int = 0
    padding: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision + self.prompt + self.response + self.loss + self.padding


class CostModel:
    """Costs of work under one kind of sharing.

    Args:
        backward: count forward and backward pass, not the forward pass alone.
        vision_backward: False where tower and merger are frozen: their backward pass is then not run.
    """

    def __init__(
        self,
        architecture: ArchitectureNumbers,
        sharing: Sharing = "full",
        *,
        backward: bool = True,
        vision_backward: bool = True,
    ):
        numbers = architecture
        self.sharing = sharing
        hidden = numbers.hidden_size
        query, key = numbers.num_heads * numbers.head_dim, numbers.num_kv_heads * numbers.head_dim
        language = 3 if backward else 1
        projections = 4 * hidden * query + 4 * hidden * key + 6 * hidden * numbers.ffn_size
        self._token = language * numbers.num_layers * projections
        self._token_pair = language * numbers.num_layers * 4 * query
        self._loss_token = (4 if backward else 1) * 2 * hidden * numbers.vocabulary_size
        self._language_width = hidden * numbers.num_layers

        tower = 3 if backward and vision_backward else 1
        width, depth, cell = numbers.vision_hidden_size, numbers.vision_depth, numbers.vision_merge_size**2
        block = 8 * width**2 + 6 * width * numbers.vision_ffn_size
        self._patch_embedding = min(tower, 2) * 2 * numbers.vision_patch_values * width
        self._patch_blocks = tower * depth * block
        self._cell = cell
        self._merger = tower * 2 * cell * width * (cell * width + numbers.vision_out_hidden_size)
        self._patch_pair = tower * 4 * width
        self._window = numbers.vision_window_patches
        self._full_blocks = sum(block < depth for block in set(numbers.vision_full_attention_blocks))
        self._window_blocks = depth - self._full_blocks
        self._vision_width = width * depth

    @property
    def patches_of_a_token(self) -> int:
        """Patches of a merged cell, which is one token of the language model."""
        return self._cell

    def tokens_flops(self, num_tokens: int, *, behind: int = 0) -> int:
        """The language model on consecutive tokens that also see the ``behind`` tokens before them."""
        pairs = num_tokens * behind + num_tokens * (num_tokens + 1) // 2
        return num_tokens * self._token + pairs * self._token_pair

    def loss_flops(self, num_tokens: int) -> int:
        """Output layer and loss on so many response tokens."""
        return num_tokens * self._loss_token

    def response_flops(self, prompt_tokens: int, response_tokens: int) -> int:
        """A response behind its prompt under full sharing, without the loss: its last token is not run."""
        return self.tokens_flops(max(response_tokens - 1, 0), behind=prompt_tokens)

    def view_flops(self, view: ViewWork) -> int:
        """A view under full sharing, with the loss and without the images."""
        responses = sum(self.response_flops(view.prompt_tokens, tokens) for tokens in view.response_tokens)
        return self.tokens_flops(view.prompt_tokens) + responses + self.loss_flops(sum(view.response_tokens))

    def image_flops(self, patches: int) -> int:
        """The vision tower and the merger on one image of one frame.

        Frames do not attend to each other: a grid of several costs as much as so many images of one of them.
        """
        keys = self._full_blocks * patches + self._window_blocks * min(patches, self._window)
        each = self._patch_embedding + self._patch_blocks + keys * self._patch_pair
        return patches * each + patches // self._cell * self._merger

    def image_memory(self, patches: int) -> int:
        """Tokens of the language model that keep as many activations as an image: patches · DB / HL, rounded down.

        It takes the activations of a layer to be proportional to its width.
        """
        return patches * self._vision_width // self._language_width

    def flops(self, views: Sequence[ViewWork]) -> Flops:
        """All that a micro-batch of these views computes."""
        responses = [(view.prompt_tokens, tokens) for view in views for tokens in view.response_tokens]
        vision = sum(map(self.image_flops, self.encoded_images(views)))
        loss = self.loss_flops(sum(tokens for _, tokens in responses))
        if self.sharing == "full":
            return Flops(
                vision=vision,
                prompt=sum(self.tokens_flops(view.prompt_tokens) for view in views),
                response=sum(self.response_flops(prompt, tokens) for prompt, tokens in responses),
                loss=loss,
            )
        used = sum(self.tokens_flops(prompt + tokens) for prompt, tokens in responses)
        prompts = sum(self.tokens_flops(prompt) for prompt, _ in responses)
        longest = max((prompt + tokens for prompt, tokens in responses), default=0)
        padded = len(responses) * self.tokens_flops(longest)
        return Flops(vision=vision, prompt=prompts, response=used - prompts, loss=loss, padding=padded - used)

    def attention_flops(self, views: Sequence[ViewWork]) -> Flops:
        """What of ``flops`` the attention alone takes: queries with keys, and their weights with values."""
        attention = copy.copy(self)
        attention._token = attention._loss_token = 0
        attention._patch_embedding = attention._patch_blocks = attention._merger = 0
        return attention.flops(views)

    def memory(self, views: Sequence[ViewWork]) -> int:
        """Activations of a micro-batch of these views, in tokens of the language model."""
        images = sum(map(self.image_memory, self.encoded_images(views)))
        if self.sharing == "full":
            return images + sum(self.view_tokens(view) for view in views)
        lengths = [length for view in views for length in view.row_lengths]
        return images + len(lengths) * max(lengths, default=0)

    def view_tokens(self, view: ViewWork) -> int:
        """Tokens that the language model runs for a view under full sharing."""
        return view.prompt_tokens + sum(max(tokens - 1, 0) for tokens in view.response_tokens)

    def encoded_images(self, views: Iterable[ViewWork]) -> list[int]:
        """Patches of each image that the vision tower encodes for a micro-batch of these views."""
        if self.sharing != "none":
            return list(distinct_images(views).values())
        return [patches for view in views for _ in view.sequence_indices for _, patches in view.images]


def step_flops(costs: Sequence[Sequence[int]], stages: int = 1) -> float:
    """What a step of the pipelines takes, in work of one process: ``costs[data_rank][micro_batch]``.

    max over ranks of (Σ costs + (stages − 1) · largest cost) / stages: a stage works on its share of all micro-batches
    of the rank, and waits for the others' shares of one while the pipeline fills and drains.
    """
    return max((sum(rank) + (stages - 1) * max(rank, default=0)) / stages for rank in costs)
