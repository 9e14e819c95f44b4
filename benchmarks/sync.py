"""Weights from the trainer to a colocated vLLM: `python benchmarks/sync.py [--quick] [--rounds N] [--json FILE]`.

Layers of the true 3B shapes in bfloat16, one process: seconds of a whole update (export from megatron-core, vLLM's
reload, attestation) against copying the same bytes from memory to memory in the same process, and what of it is the
export alone and the attestation. Two numbers of layers show whether the seconds grow as the bytes do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import Row, make_row, report, run_in_turn

from perl_megatron.runtime import environment

environment.prepare_process()

from perl_megatron.runtime import platform  # noqa: E402

platform.install()

import torch  # noqa: E402

COPY_GOAL, ATTEST_GOAL, LINEAR_GOAL = 2.0, 0.05, 1.15
LAYERS = (2, 6)
SHAPE = {
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 2,
    "intermediate": 11008,
    "vision_hidden": 1280,
    "vision_depth": 2,
    "vision_heads": 16,
    "vision_intermediate": 3420,
}


def make_policy(folder: Path, layers: int, *, quick: bool) -> None:
    """A random checkpoint of the 3B's layer shapes, or a tiny one."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    from make_tiny_policy import TinyShape, make_tiny_policy

    make_tiny_policy(folder, TinyShape(layers=layers, tie=True, **({} if quick else SHAPE)), seed=0)


def work(folder: Path, repeats: int) -> dict[str, Any]:
    """Medians, in seconds, of an update and its parts."""
    from perl_megatron.checkpoint.hf_files import open_checkpoint
    from perl_megatron.checkpoint.stream import export_weights, import_weights
    from perl_megatron.config.schema import ModelConfig, ParallelConfig, RolloutConfig
    from perl_megatron.data.processor import PromptEncoder
    from perl_megatron.model.architecture import read_architecture
    from perl_megatron.model.policy import build_policy
    from perl_megatron.rollout.vllm_colocated import VllmColocatedEngine
    from perl_megatron.runtime import topology

    layout = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=600)
    architecture = read_architecture(folder)
    model = ModelConfig(path=folder, dtype="bfloat16")
    chunks = build_policy(architecture, model, ParallelConfig(), layout)
    import_weights(chunks, architecture, layout, open_checkpoint(folder))
    engine = VllmColocatedEngine(
        RolloutConfig(cpu_cache_gib=0.25, full_attestation_every=0),
        encoder=PromptEncoder(folder, system_prompt=""),
        model_path=folder,
        topology=layout,
        tensor_parallel_size=1,
        seed=0,
        dtype=torch.bfloat16,
        max_model_length=256,
        max_images=1,
    )
    sources = [tensor for _, tensor in export_weights(chunks, architecture, layout)]
    targets = [torch.zeros_like(tensor) for tensor in sources]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        """As the actor gives it."""
        return export_weights(chunks, architecture, layout, copies=False)

    def export() -> None:
        for _ in stream():
            pass

    version, attests = 0, []

    def update() -> None:
        nonlocal version
        version += 1
        attests.append(engine.update_weights(stream(), version).attest_seconds)

    seconds = {each.__name__: _medians(each, repeats) for each in (copy, export, update)}
    num_bytes = sum(tensor.nbytes for tensor in sources)
    engine.close()
    topology.shutdown()
    return {**seconds, "attest": statistics.median(attests[1:]), "bytes": num_bytes}


def _medians(action: Callable[[], None], repeats: int) -> float:
    """After one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def rows_of(results: dict[int, list[dict[str, Any]]]) -> list[Row]:
    """Of each number of layers, and of all."""
    rows = []
    for layers, of_rounds in results.items():

        def all_of(name: str, of_rounds: list[dict[str, Any]] = of_rounds) -> list[float]:
            return [each[name] for each in of_rounds]

        label = f"{layers} layers, {of_rounds[0]['bytes'] / 1e6:.0f} MB"
        rows.append(make_row(f"{label}: update", all_of("update"), "memory copy", all_of("copy"), "s", COPY_GOAL))
        rows.append(make_row(f"{label}: export alone", all_of("export"), "memory copy", all_of("copy"), "s", COPY_GOAL))
        rows.append(make_row(f"{label}: attestation", all_of("attest"), "update", all_of("update"), "s", ATTEST_GOAL))
    few, many = (results[layers] for layers in sorted(results))
    speeds = [[each["update"] / each["bytes"] * 1e9 for each in side] for side in (many, few)]
    rows.append(make_row("update per GB, many layers", speeds[0], "few layers", speeds[1], "s/GB", LINEAR_GOAL))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny layers, one round")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each number of layers")
    parser.add_argument("--repeats", type=int, default=3, help="updates of each process after one that warms up")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.folder / options.worker, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            make_policy(Path(folder) / str(layers), layers, quick=options.quick)
        results = run_in_turn(
            Path(__file__),
            [str(layers) for layers in LAYERS],
            ["--folder", folder, "--repeats", str(1 if options.quick else options.repeats)],
            rounds=1 if options.quick else options.rounds,
            threads=options.threads,
        )
    rows = rows_of({int(layers): of_rounds for layers, of_rounds in results.items()})
    report(f"weight updates, {options.threads} threads", rows, options.json)


if __name__ == "__main__":
    main()
