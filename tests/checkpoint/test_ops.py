import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.checkpoint.ops import (
    Column,
    FlattenedKernel,
    GateUp,
    GroupedQkv,
    Replicated,
    Row,
    StackedQkv,
    Vocabulary,
    Whole,
)
from perl_megatron.errors import UserError

sizes = st.sampled_from([1, 2, 4])


def numbered(*shape):
    """Every element differs, so any mix-up shows."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).reshape(shape)


def cases(size, factor, width):
    """(op, published tensors) with pairwise-distinct dimensions that ``size`` divides where it must."""
    heads, groups, head_dim, inner = 4 * size * factor, 2 * size * factor, 3, width
    rows = size * factor * 5
    qkv = [numbered(n * head_dim, inner) + 1000 * i for i, n in enumerate((heads, groups, groups))]
    return [
        (Replicated(), [numbered(7, inner)]),
        (FlattenedKernel((3, 2, 5)), [numbered(inner, 3, 2, 5)]),
        (Column(), [numbered(rows, inner)]),
        (Column(), [numbered(rows)]),
        (Row(), [numbered(inner, rows)]),
        (GateUp(), [numbered(rows, inner), numbered(rows, inner) + 1000]),
        (GateUp(), [numbered(rows), numbered(rows) + 1000]),
        (GroupedQkv(heads, groups, head_dim), qkv),
        (GroupedQkv(heads, groups, head_dim), [part[:, 0] for part in qkv]),
        (StackedQkv(heads), [numbered(3 * heads * head_dim, inner)]),
        (StackedQkv(heads), [numbered(3 * heads * head_dim)]),
        (Vocabulary(4 * factor + 3), [numbered(4 * factor + 3, inner)]),
        (Whole(GateUp()), [numbered(5, inner), numbered(5, inner) + 1000]),
        (Whole(StackedQkv(heads)), [numbered(3 * heads * head_dim, inner)]),
    ]


@settings(max_examples=30, deadline=None)
@given(size=sizes, factor=st.integers(1, 3), width=st.integers(1, 11))
def test_join_undoes_split(size, factor, width):
    for op, parts in cases(size, factor, width):
        shards = [op.split(parts, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        joined = op.join(shards if op.sharded else shards[:1])
        assert len(joined) == len(parts)
        assert all(torch.equal(ours, part) for ours, part in zip(joined, parts, strict=True)), op


def test_sharded_ops_hold_each_number_once():
    for op, parts in cases(2, 1, 7):
        shards = [op.split(parts, rank, 2) for rank in range(2)]
        if op.sharded and not isinstance(op, Vocabulary):
            given_numbers = torch.cat([part.flatten() for part in parts]).sort().values
            assert torch.equal(torch.cat([shard.flatten() for shard in shards]).sort().values, given_numbers), op


def test_grouped_qkv_puts_a_groups_queries_key_and_value_together():
    query, key, value = numbered(8, 1), numbered(4, 1) + 100, numbered(4, 1) + 200  # 4 heads, 2 groups, head_dim 2
    shard = GroupedQkv(4, 2, 2).split([query, key, value], 1, 2)
    assert shard[:, 0].tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


def test_stacked_qkv_puts_a_heads_query_key_and_value_together():
    stacked = numbered(12)  # 2 heads, head_dim 2
    assert StackedQkv(2).split([stacked], 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


def test_vocabulary_is_filled_with_zeros():
    shards = [Vocabulary(5).split([numbered(5, 1) + 1], rank, 2) for rank in range(2)]
    assert [shard[:, 0].tolist() for shard in shards] == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize(("op", "shape"), [(Column(), (5, 3)), (Row(), (3, 5)), (GroupedQkv(6, 3, 2), (12, 4))])
def test_uneven_split_is_refused(op, shape):
    parts = [numbered(*shape)] if not isinstance(op, GroupedQkv) else [numbered(12, 4), numbered(6, 4), numbered(6, 4)]
    with pytest.raises(UserError, match="does not split into 2"):
        op.split(parts, 0, 2)
