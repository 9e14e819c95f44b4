"""Run under torchrun: converted checkpoints loaded by megatron-core in several layouts, and its own ones read back.

    torchrun --nproc-per-node 2 conversion_worker.py FOLDER

FOLDER holds for each of 'untied' and 'tied' a Hugging Face folder and the torch_dist folders NAME-TPxPP; writes
result.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron_checkpoint import load_policy, parameters, save_policy

from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.checkpoint.stream import import_weights
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import collective, platform, topology

CONVERTED = ("1x1", "2x1", "1x2")
LAYOUTS = {
    f"{name}, {label}": (name, ParallelConfig(**sizes))
    for name in ("untied", "tied")
    for label, sizes in {
        "tensor 2": {"tensor": 2},
        "pipeline 2": {"pipeline": 2},
        "pipeline 2, virtual 2": {"pipeline": 2, "virtual_pipeline": 2},
    }.items()
}


def check_layout(folder: Path, label: str, name: str, parallel: ParallelConfig) -> dict[str, bool]:
    layout = topology.initialize(parallel, seed=0, timeout_seconds=120)
    architecture = read_architecture(folder / name)
    chunks = build_policy(architecture, ModelConfig(path=folder / name, dtype="float32"), parallel, layout)
    import_weights(chunks, architecture, layout, open_weights(folder / name))
    expected = parameters(chunks)
    saved = folder / label.replace(", ", "-").replace(" ", "")
    collective.gather_objects(saved.mkdir() if collective.rank() == 0 else None)
    save_policy(chunks, saved)
    result = {}
    for converted in CONVERTED:
        load_policy(chunks, folder / f"{name}-{converted}")
        result[f"loads {converted}"] = all(map(torch.equal, parameters(chunks), expected))
    source, back = open_weights(folder / name), open_weights(saved, config=folder / name)
    result["read back"] = set(back) == set(source) and all(torch.equal(back[key], source[key]) for key in source)
    topology.forget_layout()
    return {key: all(collective.gather_objects(value)) for key, value in result.items()}


def main(folder: Path) -> None:
    platform.install()
    results = {label: check_layout(folder, label, name, parallel) for label, (name, parallel) in LAYOUTS.items()}
    if platform.rank_and_world_size()[0] == 0:
        (folder / "result.json").write_text(json.dumps(results))
    topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
