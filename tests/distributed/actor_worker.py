"""Run by torchrun on two ranks: every layout through the actor; rank 0 writes what it found for the tests to judge.

torchrun --nproc-per-node 2 actor_worker.py CASES_FOLDER OUT_FOLDER TABLE

TABLE is a key of ``TABLES``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from perl_megatron.runtime import platform

platform.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from actor_case import (  # noqa: E402
    GRADIENT_STEP,
    make_config,
    make_encoder,
    make_odd_sequences,
    make_sequences,
    weights_of,
    with_log_probs,
)

from perl_megatron.checkpoint import state_gather  # noqa: E402
from perl_megatron.checkpoint.state import latest_checkpoint  # noqa: E402
from perl_megatron.checkpoint.state_parts import StatePlanner  # noqa: E402
from perl_megatron.model.vision_shares import gradient_group  # noqa: E402
from perl_megatron.runtime import garbage  # noqa: E402
from perl_megatron.runtime import topology as layout  # noqa: E402
from perl_megatron.runtime.collective import gather_objects, rank  # noqa: E402
from perl_megatron.train.actor import Actor  # noqa: E402
from perl_megatron.train.batch import TrainingSequence  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2}},
    "tensor_sequence": {"parallel": {"tensor": 2, "sequence": True}},
    "tensor_replicated_tower": {"parallel": {"tensor": 2, "vision": "replicated"}},
    "tensor_sequence_replicated_tower": {"parallel": {"tensor": 2, "sequence": True, "vision": "replicated"}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "pipeline_tied": {"parallel": {"pipeline": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "interleaved_tied": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "interleaved_small_micro_batches": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "actor": {"micro_batch_tokens": 1},
    },
    "uneven": {"parallel": {"pipeline": 2, "first_stage_layers": 1}},
    "context": {"parallel": {"context": 2}},
    "context_replicated_optimizer": {"parallel": {"context": 2}, "optimizer": {"distributed": False}},
    "context_small_micro_batches": {"parallel": {"context": 2}, "actor": {"micro_batch_tokens": 1}},
    "selective_recompute": {"parallel": {"pipeline": 2}, "model": {"recompute": "selective"}},
    "full_recompute": {"parallel": {"context": 2}, "model": {"recompute": "full"}},
    "full_recompute_packed": {"parallel": {"tensor": 2, "sequence": True}, "model": {"recompute": "full"}},
    "images_shared": {"parallel": {"tensor": 2, "sequence": True}, "actor": {"sharing": "vision"}},
    "nothing_shared": {"parallel": {"pipeline": 2}, "actor": {"sharing": "none"}},
    "data": {"parallel": {"data": 2}},
    "data_replicated_optimizer": {"parallel": {"data": 2}, "optimizer": {"distributed": False}},
    "data_small_micro_batches": {"parallel": {"data": 2}, "actor": {"micro_batch_tokens": 80}},
}
SEQUENCE_PARALLEL = ("tensor_sequence", "tensor_sequence_replicated_tower")
FROZEN_LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor_frozen_images": {
        "parallel": {"tensor": 2, "sequence": True},
        "optimizer": {"vision_multiplier": 0.0, "merger_multiplier": 0.0},
    },
    "tensor_frozen_language": {
        "parallel": {"tensor": 2},
        "optimizer": {"language_multiplier": 0.0, "merger_multiplier": 0.5},
    },
    "tensor_sequence_frozen_language_tied": {
        "parallel": {"tensor": 2, "sequence": True},
        "optimizer": {"language_multiplier": 0.0},
    },
    "tensor_replicated_tower_frozen_vision": {
        "parallel": {"tensor": 2, "vision": "replicated"},
        "optimizer": {"vision_multiplier": 0.0, "merger_multiplier": 3.0, "distributed": False},
    },
    "pipeline_frozen_language": {
        "parallel": {"pipeline": 2},
        "optimizer": {"language_multiplier": 0.0, "merger_multiplier": 0.5},
    },
    "pipeline_frozen_language_replicated_optimizer": {
        "parallel": {"pipeline": 2},
        "optimizer": {"language_multiplier": 0.0, "merger_multiplier": 0.5, "distributed": False},
    },
    "pipeline_frozen_language_tied": {"parallel": {"pipeline": 2}, "optimizer": {"language_multiplier": 0.0}},
    "interleaved_frozen_language": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "optimizer": {"language_multiplier": 0.0},
    },
    "context_frozen_merger": {"parallel": {"context": 2}, "optimizer": {"merger_multiplier": 0.0}},
    "data_frozen_vision": {"parallel": {"data": 2}, "optimizer": {"vision_multiplier": 0.0, "merger_multiplier": 3.0}},
}
"""Parts that are frozen or have their own rate; with a frozen language model, the last stage has nothing to train."""
ODD_LAYOUTS: dict[str, dict[str, Any]] = {
    **{
        f"{name}_{size}": {**LAYOUTS[name], "actor": {"micro_batch_tokens": size}}
        for name in ("data", "pipeline", "interleaved", "context", *SEQUENCE_PARALLEL)
        for size in (1, 200)
    },
    "data_replicated_optimizer_1": {
        "parallel": {"data": 2},
        "optimizer": {"distributed": False},
        "actor": {"micro_batch_tokens": 1},
    },
    "data_filler": {"parallel": {"data": 2}},
    # A rank without images then has nothing of its own to train, and must go the way back with the other all the same.
    "tensor_replicated_tower_frozen_language_1": {
        "parallel": {"tensor": 2, "vision": "replicated"},
        "optimizer": {"language_multiplier": 0.0},
        "actor": {"micro_batch_tokens": 1},
    },
}
"""Trained on odd micro-batches: without images, with one, with many, with images of very different sizes."""
FILLER = ("data_filler",)
"""Trained on a single sequence, which leaves nothing for the second data rank."""
TABLES = {"layouts": LAYOUTS, "frozen": FROZEN_LAYOUTS, "odd": ODD_LAYOUTS}
TIED = (
    "pipeline_tied",
    "interleaved_tied",
    "pipeline_frozen_language_tied",
    "tensor_sequence_frozen_language_tied",
)
"""Layouts of the case whose output layer is the embedding, as in the published 3B model."""
RESUMED = ("tensor", "tensor_sequence_replicated_tower", "data", "interleaved", "context")
RESUMED_FROZEN = (
    "tensor_frozen_language",
    "pipeline_frozen_language",
    "pipeline_frozen_language_replicated_optimizer",
    "interleaved_frozen_language",
    "data_frozen_vision",
)
RESHARDED = ("tensor_sequence_replicated_tower", "pipeline")
"""Layouts that also continue from the first layout's checkpoint."""


# The process group stays: its store cannot be joined twice under one torchrun.


def main(cases: Path, out: Path, table: str) -> None:
    torch.set_num_threads(1)
    garbage.stay()
    for name, sections in TABLES[table].items():
        case = folder_of(cases, name)
        encoder = make_encoder(case)
        arrays, report = measure(case, encoder, sections, sequences_of(name, case, encoder))
        if name in RESUMED + RESUMED_FROZEN:
            report |= resume(case, encoder, sections, out / "checkpoints" / name)
        if name in RESHARDED:
            actor = start_again(case, encoder, sections)
            actor.restore(out / "checkpoints" / RESUMED[0] / "step-00000002")
            report["metrics_of_rest"] = train(actor, case, encoder, [2, 3])
        if rank() == 0:
            np.savez(out / f"{name}.npz", **arrays)
            (out / f"{name}.json").write_text(json.dumps(report))
        layout.forget_layout()


def folder_of(cases: Path, name: str) -> Path:
    """The folder of a layout's case."""
    return cases / ("tied" if name in TIED else "untied")


def start(case: Path, encoder: Any, sections: dict[str, Any], **optimizer: Any) -> Actor:
    config = make_config(case, **{**sections, "optimizer": {**sections.get("optimizer", {}), **optimizer}})
    topology = layout.initialize(config.parallel, seed=0, timeout_seconds=120)
    return Actor(config, topology, encoder, total_steps=10)


def sequences_of(name: str, case: Path, encoder: Any) -> list[TrainingSequence]:
    """What a layout is measured with."""
    if name in ODD_LAYOUTS:
        return make_odd_sequences(case, encoder, "many" if name in FILLER else "mixed")
    return make_sequences(case, encoder)


def measure(
    case: Path, encoder: Any, sections: dict[str, Any], sequences: list[TrainingSequence]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Log-probabilities, and the weights before and after a step that shows the gradient."""
    actor = start(case, encoder, sections, **GRADIENT_STEP)
    log_probs = actor.log_probs(sequences)
    reference = actor.reference_log_probs(sequences)
    before = weights_of(actor)
    metrics = actor.update(with_log_probs(sequences, log_probs, reference, noise=0.5))
    after = weights_of(actor)
    mine = [float(np.concatenate(log_probs).sum()), metrics, digest_of_replicas(actor)]
    arrays = {"log_probs": np.concatenate(log_probs), "reference": np.concatenate(reference)}
    arrays |= {f"before/{name}": value for name, value in before.items()}
    arrays |= {f"after/{name}": value for name, value in after.items()}
    return arrays, {"metrics": metrics, "ranks_agree": all(other == mine for other in gather_objects(mine))}


def digest_of_replicas(actor: Actor) -> str:
    """Of the parameters that the tensor-parallel ranks hold alike, each with gradients of its own."""
    parameters = [parameter for module in actor.modules for parameter in module.parameters()]
    replicas = [parameter.detach().numpy() for parameter in parameters if gradient_group(parameter) is not None]
    return hashlib.sha256(b"".join(map(np.ndarray.tobytes, replicas))).hexdigest()


def resume(case: Path, encoder: Any, sections: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Four updates at a stretch against two, a checkpoint, and two more in another actor.

    The checkpoint is the second one, by the plan of the first; a third is planned anew, its
    optimizer's states brought in small pieces.
    """
    uninterrupted = start_again(case, encoder, sections)
    train(uninterrupted, case, encoder, [0])
    uninterrupted.save(folder, 1, {})
    train(uninterrupted, case, encoder, [1])
    checkpoint = uninterrupted.save(folder, 2, {"note": "after two"})
    uninterrupted._checkpoints, whole = StatePlanner(), state_gather.PIECE_BYTES
    state_gather.PIECE_BYTES = 5001
    planned_anew = uninterrupted.save(folder / "planned-anew", 2, {"note": "after two"})
    state_gather.PIECE_BYTES = whole
    rest = train(uninterrupted, case, encoder, [2, 3])
    expected = weights_of(uninterrupted)
    continued = start_again(case, encoder, sections)
    found = latest_checkpoint(folder)
    assert found == checkpoint
    extra = continued.restore(found)
    rest_again = train(continued, case, encoder, [2, 3])
    actual = weights_of(continued)
    return {
        "extra": extra,
        "same_files": data_files(checkpoint) == data_files(planned_anew),
        "metrics_of_rest": rest,
        "same_metrics": rest == rest_again,
        "same_weights": all(np.array_equal(expected[name], actual[name]) for name in expected),
    }


def data_files(checkpoint: Path) -> dict[str, str]:
    """Name and digest."""
    files = list(checkpoint.glob("*.distcp"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def start_again(case: Path, encoder: Any, sections: dict[str, Any]) -> Actor:
    layout.forget_layout()
    return start(case, encoder, sections)


def train(actor: Actor, case: Path, encoder: Any, seeds: list[int]) -> list[dict[str, float]]:
    results = []
    for seed in seeds:
        sequences = make_sequences(case, encoder, seed=seed)
        log_probs, reference = actor.log_probs(sequences), actor.reference_log_probs(sequences)
        results.append(actor.update(with_log_probs(sequences, log_probs, reference, noise=0.3)))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
