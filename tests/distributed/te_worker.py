"""Run by torchrun on two ranks, once for each phase: a training state goes to TransformerEngine's side and back.

torchrun --nproc-per-node 2 te_worker.py CASE_FOLDER OUT_FOLDER PHASE

'write' and 'return' run with torch alone, 'carry' with the stand-in for TransformerEngine on the path, which makes
megatron-core take its optimizer, too. Each rank writes what it found to OUT_FOLDER/LAYOUT-PHASE-RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from megatron.core.transformer.attention import Attention  # noqa: E402

from perl_megatron.checkpoint.qwen25_vl_table import canonical_megatron_name  # noqa: E402
from perl_megatron.model import layer_specs, transformer_configs  # noqa: E402
from perl_megatron.model.vision_shares import share_images  # noqa: E402
from perl_megatron.runtime import garbage  # noqa: E402
from perl_megatron.runtime import topology as layout  # noqa: E402
from perl_megatron.runtime.collective import rank  # noqa: E402
from perl_megatron.train.actor import Actor  # noqa: E402
from perl_megatron.train.batch import TrainingSequence  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"parallel": {"data": 2}},
    "data_replicated_optimizer": {"parallel": {"data": 2}, "optimizer": {"distributed": False}},
    "tensor": {"parallel": {"tensor": 2}},
    "tensor_sequence": {"parallel": {"tensor": 2, "sequence": True}},
    "tensor_replicated_tower": {"parallel": {"tensor": 2, "vision": "replicated"}},
    "pipeline": {"parallel": {"pipeline": 2}},
}
PHASES = ("write", "carry", "return")


class Case:
    """One layout in this process: its actors and its checkpoints, which all phases share."""

    def __init__(self, case: Path, out: Path, name: str):
        self.encoder, self.folder = make_encoder(case), out / name
        self.config = make_config(case, **LAYOUTS[name])
        self.topology = layout.initialize(self.config.parallel, seed=0, timeout_seconds=120)
        self.sequences = make_sequences(case, self.encoder)

    def start(self, checkpoint: str | None = None) -> Actor:
        """A new actor, which goes on from the checkpoint."""
        actor = Actor(self.config, self.topology, self.encoder, total_steps=10)
        if checkpoint is not None:
            actor.restore(next((self.folder / checkpoint).glob("step-*")))
        return actor

    def batch(self) -> list[TrainingSequence]:
        """Of the same numbers in every phase: nothing in it is an actor's."""
        flat = [np.full(len(sequence.response), -5.0) for sequence in self.sequences]
        return with_log_probs(self.sequences, flat, flat, noise=0.3)


def write(case: Case) -> dict[str, Any]:
    """torch's layers and optimizer: three updates, a checkpoint after the first."""
    actor = case.start()
    found = {"described": describe(actor)}
    trajectory = [actor.update(case.batch())]
    actor.save(case.folder / "torch", 1, {})
    keep(case, "torch-1", actor)
    for step in (2, 3):
        trajectory.append(actor.update(case.batch()))
        keep(case, f"torch-{step}", actor)
    return found | {"trajectory": trajectory}


def carry(case: Case) -> dict[str, Any]:
    """TransformerEngine's layers and optimizer take up torch's checkpoint, and save it; its optimizer also goes on.

    The update is made with torch's layers, as the stand-in's have no backward pass over ranks.
    """
    with cuda_machine():
        engine = case.start("torch")
    engine.save(case.folder / "engine", 1, {})
    found = {"described": describe(engine), "optimizer": type(engine.optimizer.megatron.optimizer).__name__}
    keep(case, "engine-1", engine)
    actor = case.start("torch")
    found["update"] = actor.update(case.batch())
    actor.save(case.folder / "engine-updated", 2, {})
    keep(case, "engine-2", actor)
    again = case.start("torch")
    if case.topology.pipeline_size == 1 and not case.config.parallel.sequence:
        with cuda_machine():
            first = case.start()
        found["language"] = read(case, first)
    if engine.modules[0].vision_model is not None:
        found["vision"] = see(case, engine, again)
    return found


def come_back(case: Case) -> dict[str, Any]:
    """torch's layers and optimizer go on from what TransformerEngine's saved, before and after its update."""
    second = case.start("engine")
    found = {"second": second.update(case.batch())}
    keep(case, "back-2", second)
    third = case.start("engine-updated")
    found["third"] = third.update(case.batch())
    keep(case, "back-3", third)
    return found


def keep(case: Case, name: str, actor: Actor) -> None:
    """All weights, for the tests to compare."""
    weights = weights_of(actor)
    if rank() == 0:
        np.savez(case.folder / f"{name}.npz", **weights)


@contextmanager
def cuda_machine() -> Iterator[None]:
    """What is built inside is built as where there is CUDA, on the CPU's memory, and in float32 for its precision."""
    cuda, cpu = mock.Mock(return_value=True), mock.Mock(return_value=torch.device("cpu"))
    with (
        mock.patch.multiple(platform, is_cuda=cuda, device=cpu),
        mock.patch.multiple(layer_specs, uses_transformer_engine=cuda),
        mock.patch.multiple(transformer_configs, uses_transformer_engine=cuda),
    ):
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


def read(case: Case, engine: Actor) -> dict[str, Any]:
    """Log-probabilities, and how the language model called its attention."""
    (policy,) = engine.modules
    language = [module for module in policy.language_model.modules() if isinstance(module, Attention)]
    everything = [module for module in policy.modules() if isinstance(module, Attention)]
    for module in everything:
        module.core_attention.calls.clear()
    log_probs = np.concatenate(engine.log_probs(case.sequences))
    calls = [
        [{name: describe_argument(value) for name, value in call.items()} for call in module.core_attention.calls]
        for module in language
    ]
    for module in everything:
        module.core_attention.calls.clear()
    return {
        "log_probs": log_probs.tolist(),
        "calls": calls,
        "prompts": sorted({len(sequence.prompt.token_ids) for sequence in case.sequences}),
    }


@torch.no_grad()
def see(case: Case, engine: Actor, torch_actor: Actor) -> dict[str, Any]:
    """Both vision towers on the same images: how far apart, and how each of the engine's attention was called."""
    prompt = max((sequence.prompt for sequence in case.sequences), key=lambda prompt: len(prompt.image_keys))
    patches = torch.from_numpy(np.concatenate([case.encoder.patches(key) for key in prompt.image_keys]))
    grids = torch.from_numpy(prompt.grids)
    tower, torch_tower = (actor.modules[0].vision_model for actor in (engine, torch_actor))
    assert tower is not None
    assert torch_tower is not None
    features, torch_features = tower(patches, grids), torch_tower(patches, grids)
    exact = torch_tower.double()(patches, grids)
    calls = []
    for module in tower.modules():
        if isinstance(module, Attention):
            (call,) = module.core_attention.calls
            calls.append({name: describe_argument(value) for name, value in call.items()})
    own = torch.from_numpy(prompt.grids)
    if case.topology.vision_group is not None:
        share = share_images(tuple(map(tuple, grids.tolist())), tower.numbers, case.topology.tensor_rank, 2)
        own = own[list(share.images)]
    return {
        "patches": int(own.prod(1).sum()),
        "calls": calls,
        "error": ((features - exact).norm() / exact.norm()).item(),
        "torch_error": ((torch_features - exact).norm() / exact.norm()).item(),
    }


def describe_argument(value: Any) -> Any:
    """A tensor of counts as its numbers, another one as its shape; with its dtype."""
    if not torch.is_tensor(value):
        return value
    return {"dtype": str(value.dtype), "value": list(value.shape) if value.is_floating_point() else value.tolist()}


def main(case: Path, out: Path, phase: str) -> None:
    torch.set_num_threads(1)
    garbage.stay()
    run = dict(zip(PHASES, (write, carry, come_back), strict=True))[phase]
    for name in LAYOUTS:
        found = run(Case(case, out, name))
        (out / f"{name}-{phase}-{rank()}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    assert type(layer_specs.choose_provider(torch.bfloat16)) is layer_specs.TorchSpecProvider


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
