"""Both ends take the same checksums of the same numbers, and others of others."""

from __future__ import annotations

import json

import pytest
import torch

from perl_megatron.rollout.fingerprints import Fingerprints

TENSORS = {
    "matrix": torch.arange(35.0).reshape(5, 7),
    "vector": torch.arange(6, dtype=torch.bfloat16),
    "patches": torch.arange(48.0).reshape(2, 3, 2, 4),
    "scalar": torch.tensor(2.5),
}


def prints_of(tensors: dict[str, torch.Tensor], *, version: int = 3, full: bool = False) -> Fingerprints:
    prints = Fingerprints(version=version, full=full)
    for name, tensor in tensors.items():
        prints.see(name, tensor)
    return prints


def over_json(prints: Fingerprints) -> dict[str, int]:
    """As they come from a server."""
    values: dict[str, int] = json.loads(json.dumps(prints.values))
    return values


@pytest.mark.parametrize("full", [False, True])
def test_the_same_numbers_agree_whatever_their_order(full: bool) -> None:
    others = prints_of(dict(reversed(TENSORS.items())), full=full)
    assert prints_of(TENSORS, full=full).differences(over_json(others)) == []


def test_every_number_counts_where_all_are_taken() -> None:
    sent = prints_of(TENSORS, full=True)
    for row in range(5):
        for column in range(7):
            changed = TENSORS["matrix"].clone()
            changed[row, column] += 1
            received = prints_of(TENSORS | {"matrix": changed}, full=True)
            assert sent.differences(over_json(received)) == ["matrix: it did not arrive as it was sent"]


@pytest.mark.parametrize("name", TENSORS)
def test_every_row_counts_in_a_sample(name: str) -> None:
    sent = prints_of(TENSORS)
    for row in range(TENSORS[name].shape[0] if TENSORS[name].dim() else 1):
        changed = TENSORS[name].clone()
        changed.reshape(max(1, changed.shape[0] if changed.dim() else 1), -1)[row] += 1
        received = prints_of(TENSORS | {name: changed})
        assert sent.differences(over_json(received)) == [f"{name}: it did not arrive as it was sent"]


def test_rows_that_changed_places_are_noticed() -> None:
    swapped = TENSORS["matrix"][[1, 0, 2, 3, 4]]
    assert prints_of(TENSORS).differences(prints_of(TENSORS | {"matrix": swapped}).values)


def test_a_sample_takes_other_columns_of_other_versions() -> None:
    """So that after some updates every column was looked at."""
    wide = torch.arange(2000.0).reshape(2, 1000)
    assert len({prints_of({"w": wide}, version=version).values["w"] for version in range(20)}) == 20


def test_what_is_missing_or_too_much_is_named() -> None:
    sent = prints_of({"b": TENSORS["matrix"], "a": TENSORS["vector"]})
    assert sent.differences({}) == [f"{name}: it did not arrive as it was sent" for name in ("a", "b")]
    assert sent.differences(sent.values | {"c": 0}) == ["c: it did not arrive as it was sent"]
