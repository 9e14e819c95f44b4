"""The copy of the training state that a checkpoint is written from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perl_megatron.checkpoint.state_parts import _copy_to_cpu


class Calls(TorchDispatchMode):
    """Notes the copies and how they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[dict[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.copies.append(dict(kwargs))
        return function(*args, **(kwargs or {}))


def test_copies_are_exact_in_size_and_independent() -> None:
    """No GPU is here; on one, torch page-locks (and rounds up) exactly what is asked for as non-blocking or pinned."""
    whole = torch.arange(1000.0)
    part = whole[:300]  # of a larger buffer, as the distributed optimizer's are
    first, second, own = (SimpleNamespace(index=SimpleNamespace(fqn=name)) for name in ("first", "second", "own"))
    ours = torch.ones(5)
    writer = SimpleNamespace(write_buckets=[("file", "key", ([], [(first, part), (second, whole[300:]), (own, ours)]))])
    with Calls() as calls:
        _copy_to_cpu(writer, lambda key: key == "own")  # type: ignore[arg-type]
    assert len(calls.copies) == 2
    for options in calls.copies:
        assert not options.get("non_blocking")
        assert not options.get("pin_memory")
    (_, _, (_, [*copies, (_, uncopied)])) = writer.write_buckets[0]
    assert uncopied is ours
    whole.zero_()
    assert [(item.index.fqn, len(copy), copy.untyped_storage().nbytes()) for item, copy in copies] == [
        ("first", 300, 1200),
        ("second", 700, 2800),
    ]
    assert torch.cat([copy for _, copy in copies]).equal(torch.arange(1000.0))
