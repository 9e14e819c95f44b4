import json

import pytest

from perl_megatron.data.sampler import ShuffledSampler
from perl_megatron.errors import UserError


def test_every_epoch_holds_every_record_once_in_a_new_order():
    sampler = ShuffledSampler(50, seed=1)
    epochs = [sampler.next(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(50))]}) == 4
    assert sampler.epoch == 3


def test_the_stream_does_not_depend_on_how_it_is_cut():
    whole = ShuffledSampler(7, seed=2).next(40)
    sampler = ShuffledSampler(7, seed=2)
    assert [index for count in (0, 1, 6, 7, 20, 6) for index in sampler.next(count)] == whole
    assert ShuffledSampler(7, seed=3).next(40) != whole


@pytest.mark.parametrize("position", [0, 3, 6, 7, 8, 21])  # also at and around an epoch's end
def test_a_resumed_stream_continues(position):
    whole = ShuffledSampler(7, seed=2).next(40)
    sampler = ShuffledSampler(7, seed=2)
    sampler.next(position)
    resumed = ShuffledSampler(7, seed=2)
    resumed.next(2)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.next(40 - position) == whole[position:]


@pytest.mark.parametrize(("other", "key"), [(ShuffledSampler(8, 2), "data.train"), (ShuffledSampler(7, 3), "run.seed")])
def test_another_dataset_or_seed_is_refused(other, key):
    with pytest.raises(UserError, match=key):
        other.load_state_dict(ShuffledSampler(7, 2).state_dict())
