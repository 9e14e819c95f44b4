"""Faults in the token ids: of the prompt, or in which of them a log-probability belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.triage.cases import Case, Change, ModelInput, collapse, expand
from perl_megatron.types import EncodedPrompt


def token_changes(encoder: PromptEncoder) -> Iterator[tuple[str, Change]]:
    """Name and change of each."""
    pad = encoder.image_token_id

    def without_system(case: Case) -> ModelInput | None:
        compact = case.plain.prompt.compact_ids
        if compact.count(encoder.turn_end_id) < 2:
            return None  # the only turn is the user's
        end = compact.index(encoder.turn_end_id) + 1
        newline = tuple(encoder.tokenizer("\n", add_special_tokens=False).input_ids)
        end += len(newline) if compact[end : end + len(newline)] == newline else 0
        return replace(case.plain, prompt=expand(compact[end:], case.plain.images, pad))

    def cut(start: int, end: int | None) -> Change:
        def change(case: Case) -> ModelInput | None:
            compact = case.plain.prompt.compact_ids[start:end]
            return replace(case.plain, prompt=expand(compact, case.plain.images, pad))

        return change

    def unexpanded(case: Case) -> ModelInput | None:
        plain = case.plain
        prompt = expand(plain.prompt.compact_ids, plain.images, pad)
        bare = EncodedPrompt(np.array(prompt.compact_ids), prompt.compact_ids, (), np.zeros((0, 3), np.int64), ())
        return replace(plain, prompt=bare, images=()) if plain.images else None

    def expanded_twice(case: Case) -> ModelInput | None:
        plain = case.plain
        prompt = plain.prompt
        if not plain.images:
            return None
        ids: list[int] = []
        starts: list[int] = []
        for token, is_start in zip(prompt.token_ids.tolist(), _flags(prompt), strict=True):
            if is_start:
                starts.append(len(ids))
                ids += [pad] * plain.images[len(starts) - 1].num_tokens
            ids.append(token)
        twice = EncodedPrompt(
            np.array(ids), collapse(np.array(ids), pad), tuple(starts), prompt.grids, prompt.image_keys
        )
        return replace(plain, prompt=twice)

    yield "without the system turn", without_system
    yield "the prompt's first token is missing", cut(1, None)
    yield "the prompt's last token is missing", cut(0, -1)
    yield "one image token for each image, and no pixels", unexpanded
    yield "twice the image tokens, the second half without pixels", expanded_twice
    yield "logits taken one token too late", lambda case: replace(case.plain, late=1)
    yield "logits taken one token too early", lambda case: replace(case.plain, late=-1)
    for by, where in ((1, "later"), (-1, "earlier")):
        yield f"log-probabilities written one token {where}", _rolled(by)


def _rolled(by: int) -> Change:
    def change(case: Case) -> ModelInput | None:
        # Of a single token nothing would be left to compare.
        return replace(case.plain, rolled=by) if len(case.plain.response) > 1 else None

    return change


def _flags(prompt: EncodedPrompt) -> list[bool]:
    """[P]: where an image begins."""
    flags = [False] * len(prompt.token_ids)
    for start in prompt.image_starts:
        flags[start] = True
    return flags
