"""The four published sizes: what is written down, transformers, the table and the policy all give the same shapes."""

import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_policy import hf_config

from perl_megatron.checkpoint.hf_target import HuggingFaceTarget
from perl_megatron.checkpoint.published_shapes import megatron_shapes, published_shapes
from perl_megatron.checkpoint.qwen25_vl_table import fused_megatron_name, published_name, table
from perl_megatron.checkpoint.torch_dist_layout import chunks, parameter_shape, place
from perl_megatron.checkpoint.torch_dist_writer import TorchDistTarget
from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture

CONFIGS = Path(__file__).parents[2] / "examples" / "qwen2_5_vl"
LAYOUTS = json.loads(Path(__file__).with_name("published_layouts.json").read_text())
"""`total_size` (bytes in bfloat16) is the published index's for 3B, 7B and 32B; of 72B no index was at hand."""
WORKER = Path(__file__).with_name("policy_shapes_worker.py")

each_size = pytest.mark.parametrize("size", LAYOUTS)


@cache
def expected(size: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes, the patterns `{first..last}` written out."""
    shapes = {}
    for pattern, shape in LAYOUTS[size]["shapes"].items():
        span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else [None]
        for number in numbers:
            shapes[re.sub(r"\{.*\}", str(number), pattern)] = tuple(shape)
    return shapes


@each_size
def test_what_is_written_down_adds_up(size):
    layout, shapes = LAYOUTS[size], expected(size)
    assert len(shapes) == layout["num_tensors"]
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == layout["total_size"]
    assert ("lm_head.weight" in shapes) != layout["tied"]


@each_size
def test_transformers_builds_the_same(size):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(CONFIGS / size))
    theirs = {published_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert theirs == expected(size)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == LAYOUTS[size]["tied"]


@each_size
def test_the_architecture_gives_the_same(size):
    architecture = read_architecture(CONFIGS / size)
    assert published_shapes(architecture) == expected(size)
    assert architecture.tied_embeddings == LAYOUTS[size]["tied"]


def test_no_two_dimensions_are_mistaken_for_each_other(tmp_path):
    # The published sizes have equal ones (queries and hidden size); these differ pairwise.
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = hf_config(tied=False)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    theirs = {published_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert published_shapes(read_architecture(tmp_path)) == theirs


@each_size
@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_hold_every_number_once(size, ranks):
    architecture = read_architecture(CONFIGS / size)
    published, whole, shard = (
        published_shapes(architecture),
        megatron_shapes(architecture),
        megatron_shapes(architecture, ranks),
    )
    for entry in table(architecture):
        num_published = sum(math.prod(published[name]) for name in entry.published)
        assert math.prod(whole[entry.megatron]) == num_published
        assert math.prod(shard[entry.megatron]) * (ranks if entry.op.sharded else 1) == num_published


STACKED = re.compile(r"(.*\.decoder\.layers)\.(\d+)\.(.*)")
MAX_FILE_BYTES = 1 << 30


def check_files(target, infos):
    """Every tensor is in the plan once, and files end before the limit unless they hold a single parameter."""
    rows = target.plan()
    assert sorted(row.name for row in rows) == sorted(infos)
    assert {row.name: (row.shape, row.dtype, row.nbytes) for row in rows} == {
        name: (info.shape, info.dtype, info.nbytes) for name, info in infos.items()
    }
    assert [name for group in target.groups for names in group.published for name in names] == [
        row.name for row in rows
    ]
    assert all(group.nbytes <= MAX_FILE_BYTES or len(group.published) == 1 for group in target.groups)
    for group in target.groups:
        assert group.nbytes == sum(infos[name].nbytes for names in group.published for name in names)
    files = [file for group in target.groups for file in group.files]
    assert len(files) == len(set(files))
    assert {file for row in rows for file in row.file.split()} == set(files)
    return rows


def infos_of(size):
    return {name: TensorInfo(shape, torch.bfloat16) for name, shape in expected(size).items()}


@each_size
def test_the_plan_of_a_hugging_face_folder_holds_the_published_tensors(size):
    infos = infos_of(size)
    target = HuggingFaceTarget(read_architecture(CONFIGS / size), infos, max_file_bytes=MAX_FILE_BYTES)
    rows = check_files(target, infos)
    assert sum(row.nbytes for row in rows) == LAYOUTS[size]["total_size"]
    count = len(target.groups)
    assert [group.files for group in target.groups] == [
        (f"model-{number:05d}-of-{count:05d}.safetensors",) for number in range(1, count + 1)
    ]


@each_size
def test_the_plan_of_a_torch_dist_folder_places_every_number_once(size):
    tensor_size, pipeline_size = PARALLEL[size]
    architecture, infos = read_architecture(CONFIGS / size), infos_of(size)
    options = {"tensor_size": tensor_size, "pipeline_size": pipeline_size, "max_file_bytes": MAX_FILE_BYTES}
    rows = check_files(TorchDistTarget(architecture, infos, **options), infos)
    assert sum(row.nbytes for row in rows) == LAYOUTS[size]["total_size"]
    stages = {int(file.split("_")[2]) // tensor_size for row in rows for file in row.file.split()}
    assert stages == set(range(pipeline_size))
    numbers: dict[str, int] = defaultdict(int)
    keys = {}
    for entry in table(architecture):
        where, stacked = place(entry.megatron, architecture), STACKED.fullmatch(fused_megatron_name(entry.megatron))
        assert (
            (where.key, where.layer) == (f"{stacked[1]}.{stacked[3]}", int(stacked[2]))
            if stacked
            else (
                entry.megatron,
                None,
            )
        )
        parts = [infos[name].meta() for name in entry.published]
        shape = parameter_shape(entry, parts, tensor_size)
        keys[where.key] = where.global_shape(shape)
        for rank in range(tensor_size):
            for _, values in chunks(entry, parts, rank, tensor_size):
                numbers[where.key] += values.numel()
        layer = "" if where.layer is None else f"[{where.layer}]"
        assert {row.stored.split()[0] for row in rows if row.name in entry.published} == {f"{where.key}{layer}"}
    assert numbers == {key: math.prod(shape) for key, shape in keys.items()}
    assert sum(numbers.values()) == sum(math.prod(shape) for shape in expected(size).values())


PARALLEL = {"3b": (2, 1), "7b": (4, 1), "32b": (8, 2), "72b": (8, 4)}
"""(tensor, pipeline) of the shipped training configs."""


@pytest.fixture(scope="module")
def policies():
    """Size → the shapes of its policy's parameters, of one tensor rank of all stages."""
    layouts = [f"{CONFIGS / size},{tensor},{pipeline}" for size, (tensor, pipeline) in PARALLEL.items()]
    result = subprocess.run([sys.executable, str(WORKER), *layouts], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(PARALLEL, json.loads(result.stdout.splitlines()[-1]), strict=True))


@each_size
def test_the_policy_has_the_shards_of_the_table(size, policies):
    built = {name: tuple(shape) for name, shape in policies[size].items()}
    assert built == megatron_shapes(read_architecture(CONFIGS / size), PARALLEL[size][0])


def test_a_size_that_does_not_split_is_refused():
    with pytest.raises(UserError, match="does not split into 8"):
        megatron_shapes(read_architecture(CONFIGS / "7b"), 8)
