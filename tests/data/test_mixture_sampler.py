import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perl_megatron.data.sampler import MixtureSampler, ShuffledSampler, make_sampler
from perl_megatron.errors import UserError

SIZES = st.lists(st.integers(1, 40), min_size=2, max_size=6)
WEIGHTS = st.lists(st.floats(0.01, 100, allow_nan=False).map(lambda number: round(number, 2)), min_size=6, max_size=6)


def sources_of(indices: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    """(source, index in it) of each index."""
    owners = [(source, index) for source, size in enumerate(sizes) for index in range(size)]
    return [owners[index] for index in indices]


@given(sizes=SIZES, weights=WEIGHTS | st.none(), seed=st.integers(0, 9))
@example(sizes=[1, 1, 1, 1, 1, 1], weights=[97.0, 1.0, 1.0, 0.5, 0.3, 0.2], seed=0)
@settings(max_examples=60, deadline=None)
def test_weights_are_met_at_every_prefix_and_epochs_are_whole(sizes, weights, seed):
    shares = sizes if weights is None else weights[: len(sizes)]
    drawn = sources_of(MixtureSampler(sizes, None if weights is None else shares, seed).next(300), sizes)
    counts = [0] * len(sizes)
    for number, (source, _) in enumerate(drawn, start=1):
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - number * share / sum(shares)) < 1 + 1e-9
    for source, size in enumerate(sizes):
        own = [index for owner, index in drawn if owner == source]
        for begin in range(0, len(own) - size + 1, size):
            assert sorted(own[begin : begin + size]) == list(range(size))


@given(sizes=SIZES, weights=WEIGHTS | st.none(), cuts=st.lists(st.integers(0, 30), max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_resumed_stream_is_the_uninterrupted_one(sizes, weights, cuts):
    weights = None if weights is None else weights[: len(sizes)]
    whole = MixtureSampler(sizes, weights, 3).next(sum(cuts) + 5)
    sampler, drawn = MixtureSampler(sizes, weights, 3), []
    for cut in [*cuts, 5]:
        assert sampler.peek(cut) == sampler.peek(cut)
        ahead = sampler.peek(cut)
        drawn += sampler.next(cut)
        assert ahead == drawn[len(drawn) - cut :]
        state = json.loads(json.dumps(sampler.state_dict()))
        sampler = MixtureSampler(sizes, weights, 3)
        sampler.next(2)
        sampler.load_state_dict(state)
        assert sampler.num_drawn == len(drawn)
    assert drawn == whole


def test_by_size_all_sources_end_their_epochs_together():
    sizes = [7, 2, 4]
    drawn = MixtureSampler(sizes, None, 1).next(39)
    assert [sorted(drawn[begin : begin + 13]) for begin in (0, 13, 26)] == [list(range(13))] * 3


def test_sources_are_shuffled_independently():
    sizes = [20, 20]
    drawn = sources_of(MixtureSampler(sizes, None, 1).next(80), sizes)
    orders = [tuple(index for owner, index in part if owner == source) for part in (drawn[:40], drawn[40:])
              for source in (0, 1)]  # fmt: skip
    assert len({*orders, tuple(range(20))}) == 5


def test_other_weights_hold_from_a_resume_on_without_catching_up():
    before = MixtureSampler([10, 10], [1, 1], 0)
    before.next(100)
    after = MixtureSampler([10, 10], [3, 1], 0)
    after.load_state_dict(before.state_dict())
    assert [sum(index < 10 for index in after.next(4)) for _ in range(10)] == [3] * 10
    again = MixtureSampler([10, 10], [3, 1], 0)
    again.load_state_dict(json.loads(json.dumps(after.state_dict())))
    assert again.next(7) == after.next(7)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, 0], [1, -1], [1, float("inf")], [1, float("nan")]])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(UserError, match="sources") as refusal:
        MixtureSampler([5, 5], weights, 0)
    assert refusal.value.where == "data.weights"


def test_one_source_is_drawn_as_ever():
    sampler = make_sampler([9], None, 4)
    assert isinstance(sampler, ShuffledSampler)
    assert sampler.next(30) == make_sampler([9], [2.5], 4).next(30) == ShuffledSampler(9, 4).next(30)
    with pytest.raises(UserError, match="sources"):
        make_sampler([9], [1, 2], 4)
    assert isinstance(make_sampler([9, 9], None, 4), MixtureSampler)


def test_states_of_other_data_are_refused():
    for saved, now in [
        (MixtureSampler([5, 6], None, 0), MixtureSampler([5, 7], None, 0)),
        (MixtureSampler([5, 6], None, 0), ShuffledSampler(11, 0)),
        (ShuffledSampler(11, 0), MixtureSampler([5, 6], None, 0)),
    ]:
        with pytest.raises(UserError, match=r"data\.train"):
            now.load_state_dict(saved.state_dict())
    with pytest.raises(UserError, match=r"run\.seed"):
        MixtureSampler([5, 6], None, 1).load_state_dict(MixtureSampler([5, 6], None, 0).state_dict())


def test_peeking_beyond_an_epoch_does_not_disturb_it():
    sampler, undisturbed = ShuffledSampler(5, 0), ShuffledSampler(5, 0)
    for _ in range(7):
        assert sampler.peek(12)[:2] == undisturbed.peek(2)
        assert sampler.next(2) == undisturbed.next(2)


def test_a_million_records_are_shuffled_in_eight_bytes_each():
    sampler = ShuffledSampler(10**6, 0)
    assert len(set(sampler.next(1000))) == 1000
    assert sampler._shuffle.nbytes == 8 * 10**6
