"""Run by torchrun on two ranks with the stand-in for TransformerEngine on the path: the policy's two kinds of layers.

torchrun --nproc-per-node 2 te_worker.py CASE_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from perl_megatron.runtime import platform

platform.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from actor_case import make_config, make_encoder, make_sequences, weights_of, with_log_probs  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402

from perl_megatron.checkpoint.qwen25_vl_table import canonical_megatron_name  # noqa: E402
from perl_megatron.model import layer_specs  # noqa: E402
from perl_megatron.runtime import topology as layout  # noqa: E402
from perl_megatron.runtime.collective import rank  # noqa: E402
from perl_megatron.train.actor import Actor  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"data": 2},
    "tensor": {"tensor": 2},
    "tensor_sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
}


@contextmanager
def cuda_machine() -> Iterator[None]:
    """What is built inside is built as where there is CUDA, on the CPU's memory."""
    cpu = torch.device("cpu")
    with mock.patch.multiple(platform, is_cuda=mock.Mock(return_value=True), device=mock.Mock(return_value=cpu)):
        yield


def describe(actor: Actor) -> dict[str, Any]:
    """Parameters by canonical name, parts of global tensors by key and offset, and the keys of other saved objects."""
    (policy,) = actor.modules
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = policy.sharded_state_dict(metadata=metadata)
    apply_factories(sharded)
    values = list(nested_values(sharded))
    tensors = [value for value in values if isinstance(value, ShardedTensor)]
    return {
        "classes": sorted({type(module).__name__ for module in policy.modules()}),
        "parameters": {
            canonical_megatron_name(name): [list(p.shape), str(p.dtype)] for name, p in policy.named_parameters()
        },
        "tensors": {
            f"{tensor.key} at {tuple(tensor.global_offset)}": [
                list(tensor.local_shape),
                list(tensor.global_shape),
                list(tensor.replica_id),
                str(tensor.dtype),
            ]
            for tensor in tensors
        },
        "objects": sorted(value.key for value in values if not isinstance(value, ShardedTensor)),
    }


def there_and_back(case: Path, encoder: Any, start: Callable[[], Actor], folder: Path) -> dict[str, Any]:
    """Torch's layers train and save, TransformerEngine's take it up and save it, torch's take that up and go on."""
    sequences = make_sequences(case, encoder)
    actor = start()
    log_probs = actor.log_probs(sequences)
    batch = with_log_probs(sequences, log_probs, log_probs, noise=0.3)
    actor.update(batch)
    first = actor.save(folder / "torch", 1, {})
    saved, expected = weights_of(actor), actor.update(batch)
    with cuda_machine():
        engine = start()
        engine.restore(first)
        second = engine.save(folder / "engine", 1, {})
        taken_up = weights_of(engine)
    continued = start()
    continued.restore(second)
    return {
        "moved": any(not np.array_equal(value, saved[name]) for name, value in weights_of(start()).items()),
        "same_weights": all(np.array_equal(value, saved[name]) for name, value in taken_up.items()),
        "same_update": continued.update(batch) == expected,
    }


def main(case: Path, out: Path) -> None:
    torch.set_num_threads(1)
    for name, parallel in LAYOUTS.items():
        encoder, config = make_encoder(case), make_config(case, parallel=parallel)
        topology = layout.initialize(config.parallel, seed=0, timeout_seconds=120)
        start = partial(Actor, config, topology, encoder, total_steps=10)
        found = {"torch": describe(start())}
        with cuda_machine():
            found["engine"] = describe(start())
        found["exchange"] = there_and_back(case, encoder, start, out / name)
        (out / f"{name}-{rank()}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    assert type(layer_specs.choose_provider()) is layer_specs.TorchSpecProvider


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
