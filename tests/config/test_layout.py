import itertools
from dataclasses import replace

import pytest
from derive_case import TINY
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from perl_megatron.config.layout import check_layout, check_split, length_multiple, micro_batch_multiple, stage_layers
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.errors import UserError

NUMBERS = replace(TINY, num_layers=12)


@pytest.mark.parametrize(
    ("sizes", "world_size", "what", "where", "fix"),
    [
        ({"tensor": 2}, 3, "3 processes", "parallel.tensor", "multiple of 2"),
        ({"context": 4}, 6, "context 4", "parallel.context", "multiple of 4"),
        ({"data": 2}, 3, "size 3, not 2", "parallel.data", "parallel.data=3"),
        ({"context": 2, "data": 2}, 2, "size 1, not 2", "parallel.data", "start 4 processes"),
        ({"sequence": True}, 1, "needs tensor", "parallel.sequence", "parallel.tensor"),
        ({"virtual_pipeline": 2}, 1, "needs pipeline", "parallel.virtual_pipeline = 2", "parallel.pipeline above 1"),
        ({"first_stage_layers": 1}, 1, "needs pipeline", "parallel.first_stage_layers = 1", "leave"),
        ({"last_stage_layers": 3}, 1, "needs pipeline", "parallel.last_stage_layers = 3", "leave"),
        ({"tensor": 4}, 4, "key-value heads (2)", "parallel.tensor = 4", "1, 2"),
        ({"tensor": 3}, 3, "vision heads (4)", "parallel.tensor = 3", "smaller sizes that do: 1, 2;"),
        ({"tensor": 4, "vision": "replicated"}, 4, "key-value heads (2)", "parallel.tensor = 4", "that do: 1, 2;"),
        ({"pipeline": 5}, 5, "12 layers", "parallel.pipeline = 5", "1, 2, 3, 4, 6, 12"),
        ({"pipeline": 3, "first_stage_layers": 3}, 3, "leave 9 for the other 2", "first_stage_layers = 3", "of 2"),
        ({"pipeline": 3, "last_stage_layers": 12}, 3, "leave 0 for the other 2", "last_stage_layers = 12", "positive"),
        (
            {"pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 9},
            2,
            "leave -1",
            "first_stage_layers = 4, parallel.last_stage_layers = 9",
            "add up to 12",
        ),
        ({"pipeline": 2, "virtual_pipeline": 4}, 2, "6, 6 layers", "virtual_pipeline = 4", "1, 2, 3, 6"),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 5},
            2,
            "5, 7 layers",
            "virtual_pipeline = 2",
            "chunks that do: 1;",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_the_start(sizes, world_size, what, where, fix):
    with pytest.raises(UserError) as caught:
        check(ParallelConfig(**sizes), world_size)
    error = caught.value
    assert what in error.what
    assert where in str(error.where)
    assert fix in str(error.fix)


def test_a_replicated_tower_need_not_split():
    numbers = replace(NUMBERS, vision_num_heads=3, vision_ffn_size=171)
    with pytest.raises(UserError, match=r"vision heads \(3\), vision feed-forward size \(171\)") as caught:
        check_split(ParallelConfig(tensor=2), numbers)
    assert str(caught.value.fix).startswith("parallel.vision=replicated leaves the vision tower whole; or smaller")
    check_split(ParallelConfig(tensor=2, vision="replicated"), numbers)


def check(parallel, world_size):
    check_layout(parallel, world_size)
    check_split(parallel, NUMBERS)


def test_the_data_parallel_size_is_what_is_left_over():
    parallel = ParallelConfig(tensor=2, pipeline=3, context=2)
    assert check_layout(parallel, 24) == 2


@pytest.mark.parametrize(("first", "last"), itertools.product([None, 2, 4], [None, 2, 4]))
@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_layers_are_split_as_megatron_core_splits_them(monkeypatch, pipeline, chunks, first, last):
    parallel = ParallelConfig(
        pipeline=pipeline, virtual_pipeline=chunks, first_stage_layers=first, last_stage_layers=last
    )
    num_layers = 16 if (first or 4) + (last or 4) == 8 or pipeline == 2 else 12 + (first or 2) + (last or 2)
    try:
        ours = stage_layers(parallel, num_layers)
        check = [layers % chunks == 0 for layers in ours]
    except UserError:
        ours, check = (), [False]
    options = {
        "num_layers": num_layers,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        "pipeline_dtype": "unused",
    }
    if not all(check):
        with pytest.raises((ValueError, AssertionError)):
            built(TransformerConfig(**options), pipeline, chunks)
        return
    stages = built(TransformerConfig(**options), pipeline, chunks)
    assert tuple(sum(map(len, of_stage)) for of_stage in stages) == ours
    everything = [layer for chunk in range(chunks) for of_stage in stages for layer in of_stage[chunk]]
    assert everything == list(range(num_layers))


def built(config, pipeline, chunks):
    """Layers of each chunk of each stage, by megatron-core."""
    return [
        [
            [
                get_transformer_layer_offset(config, chunk, stage) + layer
                for layer in range(get_num_layers_to_build(config, chunk, stage))
            ]
            for chunk in range(chunks)
        ]
        for stage in range(pipeline)
    ]


def test_micro_batches_of_interleaved_stages_are_a_multiple_of_the_stages():
    assert micro_batch_multiple(ParallelConfig(pipeline=3)) == 1
    assert micro_batch_multiple(ParallelConfig(pipeline=3, virtual_pipeline=2)) == 3


def test_padding_lets_every_rank_have_an_equal_part():
    assert length_multiple(ParallelConfig(tensor=4)) == 1
    assert length_multiple(ParallelConfig(tensor=4, sequence=True)) == 4
    assert length_multiple(ParallelConfig(context=3)) == 6
    assert length_multiple(ParallelConfig(tensor=4, sequence=True, context=3)) == 24
