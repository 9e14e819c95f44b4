"""What there is to compute of a view: the sizes of its prompt, responses and images, without their content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perl_megatron.types import EncodedPrompt


@dataclass(frozen=True)
class ViewWork:
    """A prompt and the responses to it. I images, not necessarily distinct; N sequences."""

    sequence_indices: tuple[int, ...]
    """[N]: positions in the caller's list of sequences."""
    prompt_tokens: int
    response_tokens: tuple[int, ...]
    """[N]: length of each response."""
    images: tuple[tuple[str, int], ...] = ()
    """[I]: content key and 14-pixel patches of each image of the prompt, in its order."""

    def __post_init__(self) -> None:
        assert len(self.sequence_indices) == len(self.response_tokens) > 0, "one response for each sequence"
        assert self.prompt_tokens > 0 <= min(self.response_tokens)

    @property
    def row_lengths(self) -> list[int]:
        """[N]: tokens of prompt and response together."""
        return [self.prompt_tokens + response for response in self.response_tokens]

    def part(self, members: Iterable[int]) -> ViewWork:
        """The view with some of its sequences only: those at these positions of ``sequence_indices``, ascending."""
        chosen = sorted(members)
        return ViewWork(
            sequence_indices=tuple(self.sequence_indices[member] for member in chosen),
            prompt_tokens=self.prompt_tokens,
            response_tokens=tuple(self.response_tokens[member] for member in chosen),
            images=self.images,
        )


def distinct_images(views: Iterable[ViewWork]) -> dict[str, int]:
    """Patches of each image by its key, in the order of first occurrence."""
    return {key: patches for view in views for key, patches in view.images}


def clusters(views: Sequence[ViewWork]) -> list[list[int]]:
    """Positions of views that have images in common, directly or through others, ascending."""
    leaders = list(range(len(views)))

    def leader(position: int) -> int:
        while leaders[position] != position:
            leaders[position] = position = leaders[leaders[position]]
        return position

    first_with: dict[str, int] = {}
    for position, view in enumerate(views):
        for key, _ in view.images:
            one, other = leader(first_with.setdefault(key, position)), leader(position)
            leaders[max(one, other)] = min(one, other)
    together: dict[int, list[int]] = {}
    for position in range(len(views)):
        together.setdefault(leader(position), []).append(position)
    return list(together.values())


def views_of(prompts: Sequence[EncodedPrompt], response_tokens: Sequence[int]) -> list[ViewWork]:
    """The views of a list of sequences, given by the prompt and the length of the response of each.

    Equal prompts over equal images are one view, whether or not they are one object: all ranks find the same views.
    Views come in the order of their first sequences.
    """
    by_object: dict[int, tuple] = {}
    members: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if id(prompt) not in by_object:
            by_object[id(prompt)] = (prompt.token_ids.tobytes(), prompt.image_keys)
        members.setdefault(by_object[id(prompt)], []).append(index)
    views = []
    for indices in members.values():
        prompt = prompts[indices[0]]
        views.append(
            ViewWork(
                sequence_indices=tuple(indices),
                prompt_tokens=len(prompt.token_ids),
                response_tokens=tuple(int(response_tokens[index]) for index in indices),
                images=tuple(zip(prompt.image_keys, map(int, prompt.grids.prod(axis=1)), strict=True)),
            )
        )
    return views
