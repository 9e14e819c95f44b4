import numpy as np
import pytest

from perl_megatron.model.context_parallel import context_part


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_parts_are_the_sequence(size):
    parts = [context_part(24, rank, size) for rank in range(size)]
    assert {len(part) for part in parts} == {24 // size}
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_causal_attention_is_the_same_work_on_every_rank():
    work = {int((context_part(48, rank, 4) + 1).sum()) for rank in range(4)}
    assert work == {49 * 48 // 2 // 4}


def test_the_order_is_the_one_that_megatron_core_cuts_a_batch_in():
    assert context_part(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert context_part(8, 1, 2).tolist() == [2, 3, 4, 5]
