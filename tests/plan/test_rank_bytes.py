"""Planned bytes are the real ones: of small policies in many layouts, and of the published 72B on 1,024 processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.plan.buffers import buckets, buffer_size, largest_optimized, optimized_count
from perl_megatron.plan.memory import static_memory
from perl_megatron.plan.parameters import Parameter, chunk_parameters, count, total_count, trained_parts

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("rank_bytes_worker.py")
SMALL, LARGE = ROOT / "benchmarks" / "small_model", ROOT / "examples" / "qwen2_5_vl" / "72b"
PUBLISHED = json.loads((ROOT / "tests" / "checkpoint" / "published_layouts.json").read_text())

CASES = {
    "one process": (["model.dtype=float32"], 1, [0]),
    "tensor and sequence": (["parallel.tensor=2", "parallel.sequence=true"], 4, [0, 3]),
    "three replicas": (["model.dtype=float32"], 3, [0, 1, 2]),
    "pipeline": (["parallel.pipeline=2", "parallel.first_stage_layers=1"], 4, [0, 1, 2, 3]),
    "interleaved": (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2, [0, 1]),
    "replicated tower": (["parallel.tensor=2", "parallel.vision=replicated"], 4, [0, 3]),
    "replicated optimizer": (["optimizer.distributed=false"], 2, [1]),
    "replicated float32": (["optimizer.distributed=false", "model.dtype=float32", "parallel.pipeline=2"], 2, [0, 1]),
    "frozen images": (["optimizer.vision_multiplier=0", "optimizer.merger_multiplier=0"], 2, [0, 1]),
    "frozen language": (["optimizer.language_multiplier=0", "parallel.pipeline=2"], 2, [0, 1]),
    "context": (["parallel.context=2", "actor.sharing=vision"], 6, [0, 3, 5]),
}
WIDE = ["parallel.tensor=8", "parallel.pipeline=4", "parallel.first_stage_layers=17", "parallel.sequence=true"]
COORDINATES = [(stage, tensor) for stage in range(4) for tensor in range(8)]
WORLD = 1024
WIDE_RANKS = [256 * stage + 8 * ((5 * tensor + 9 * stage) % 32) + tensor for stage, tensor in COORDINATES]
"""One for each place of a layout over 1,024 processes, of many replicas."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Policies of four layers: with an output layer of its own, and tied."""
    content = json.loads((SMALL / "config.json").read_text()) | {"num_hidden_layers": 4}
    folder = tmp_path_factory.mktemp("policies")
    for name, tied in (("own", False), ("tied", True)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": tied}))
    return folder


@pytest.fixture(scope="module")
def real(folder):
    """(policy, case) → what each of its ranks holds, and the wide layout's under 'wide'."""
    keys, cases = [], []
    for name in ("own", "tied"):
        for case, (overrides, world_size, ranks) in CASES.items():
            keys.append((name, case))
            cases.append({"settings": overrides, "world_size": world_size, "ranks": ranks, "meta": False})
            cases[-1]["model"] = str(folder / name)
    cases.append({"model": str(LARGE), "settings": WIDE, "world_size": WORLD, "ranks": WIDE_RANKS, "meta": True})
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    result = subprocess.run([sys.executable, str(WORKER), str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip([*keys, "wide"], json.loads(result.stdout.splitlines()[-1]), strict=True))


def planned(model, overrides, world_size):
    config = load_config(None, [f"model.path={model}", "rollout.engine=embedded", *overrides]).config
    numbers = read_architecture_numbers(model)
    return config, derive(config, world_size=world_size, architecture=numbers), numbers


def check(config, derived, numbers, ranks):
    trained, distributed = trained_parts(config.optimizer), config.optimizer.distributed
    replicas = derived.data_size * derived.context_size
    for rank in ranks:
        stage, data, context, _ = rank["place"]
        chunks = [
            chunk_parameters(numbers, config.parallel, stage, chunk) for chunk in range(derived.virtual_pipeline_size)
        ]
        assert [{one.name: one.count for one in chunk} for chunk in chunks] == rank["counts"]
        static = static_memory(config, derived, numbers, stage)
        assert (static.parameters, static.gradients) == (rank["parameters"], rank["gradients"])
        assert static.num_parameters == sum(sum(chunk.values()) for chunk in rank["counts"])
        own = sum(
            optimized_count(
                buckets([one for one in chunk if one.part in trained], replicas, distributed=distributed),
                data * derived.context_size + context,
                replicas,
                distributed=distributed,
            )
            for chunk in chunks
        )
        bytes_of_one = 8 if config.model.dtype == "float32" else 12
        assert own * bytes_of_one == rank["optimizer"]
        assert static.optimizer >= rank["optimizer"]


@pytest.mark.parametrize("name", ["own", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_every_byte_of_parameters_gradients_and_optimizer(folder, real, name, case):
    overrides, world_size, _ = CASES[case]
    check(*planned(folder / name, overrides, world_size), real[name, case])


def test_every_place_of_the_72b_on_1024_processes(real):
    config, derived, numbers = planned(LARGE, WIDE, WORLD)
    places = [(rank["place"][0], rank["place"][3]) for rank in real["wide"]]
    assert places == COORDINATES
    assert len({rank["place"][1] for rank in real["wide"]}) > 16  # replicas, which hold other parts of the optimizer
    check(config, derived, numbers, real["wide"])


def test_the_shards_of_the_72b_add_up_to_what_is_published(real):
    whole = {one.name: one.count for one in chunk_parameters(read_architecture_numbers(LARGE), ParallelConfig(), 0)}
    first_layer = dict(enumerate([0, 17, 38, 59]))
    total = 0
    for rank in real["wide"]:
        stage, _, _, tensor = rank["place"]
        for name, numbers in rank["counts"][0].items():
            prefix, found, rest = name.partition("language_model.decoder.layers.")
            if found:
                layer, _, rest = rest.partition(".")
                name = f"{prefix}{found}{int(layer) + first_layer[stage]}.{rest}"  # noqa: PLW2901
            is_whole = numbers == whole[name]
            assert is_whole or 8 * numbers == whole[name]
            total += numbers if not is_whole or tensor == 0 else 0
    assert 2 * total == PUBLISHED["72b"]["total_size"]


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_whole_model_is_the_published_one(size):
    assert 2 * total_count(read_architecture_numbers(LARGE.parent / size)) == PUBLISHED[size]["total_size"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=12), st.integers(1, 12), st.booleans()
)
def test_replicas_optimize_every_number_once(sizes, data_size, distributed):
    parameters = [Parameter(str(index), "language", size, shared) for index, (size, shared) in enumerate(sizes)]
    found = buckets(parameters, data_size, distributed=distributed)
    counts = [optimized_count(found, rank, data_size, distributed=distributed) for rank in range(data_size)]
    assert sum(counts) == count(tuple(parameters)) * (1 if distributed else data_size)
    assert buffer_size(found) >= count(tuple(parameters))
    assert largest_optimized(found, data_size, distributed=distributed) <= buffer_size(found)
    if distributed:
        assert all((bucket.end - bucket.start) % data_size == 0 for bucket in found)
