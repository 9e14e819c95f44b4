"""The comparison itself, on an engine that is a dictionary: two published matrices, fused, on two ranks."""

import dataclasses

import pytest
import torch

from perl_megatron.errors import UserError
from perl_megatron.rollout.attestation import Attestor, Holding, Place, Segment, add_up, uncovered
from perl_megatron.rollout.digest import as_matrix, checksum

SHAPES = {"q": (8, 6), "k": (4, 6), "out": (5, 8), "norm": (5,)}


def published():
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) for name, shape in SHAPES.items()
    }


class Engine:
    """Rank ``rank`` of two: q and k fused and sharded by rows, out by columns, norm whole."""

    def __init__(self, rank):
        weights = published()
        self.rank = rank
        self.held = {
            "qk": torch.cat([weights["q"][4 * rank : 4 * rank + 4], weights["k"][2 * rank : 2 * rank + 2]]),
            "out": weights["out"][:, 4 * rank : 4 * rank + 4].clone(),
            "norm": weights["norm"].clone(),
        }
        self.buffers = {"angles": torch.ones(3, 2)}

    def holdings(self):
        rank = self.rank
        segments = {
            "qk": (Segment("q", 4 * rank, 0, 4), Segment("k", 2 * rank, 4, 2)),
            "out": (Segment("out", 0, 0, 5),),
            "norm": (Segment("norm", 0, 0, 5),),
        }
        columns = {"qk": (0, 6), "out": (4 * rank, 4), "norm": (0, 1)}

        def reader(name):
            return lambda columns: as_matrix(self.held[name])[:, columns]

        return [Holding(name, segments[name], *columns[name], reader(name)) for name in segments]

    def attestor(self):
        return Attestor(self.holdings(), lambda: self.buffers)


def update(attestor, *, full, version=1, weights=None):
    passed = dict(attestor.watch((weights or published()).items(), version=version, full=full))
    assert passed.keys() == SHAPES.keys()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_sent_is_held(rank, full):
    attestor = Engine(rank).attestor()
    update(attestor, full=full)
    assert attestor.problems() == []


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("qk", 1, "q: its rows 4 to 7, columns 0 to 5, in the engine's qk"),
        ("qk", 5, "k: its rows 2 to 3, columns 0 to 5, in the engine's qk"),
        ("out", 3, "out: its rows 0 to 4, columns 4 to 7, in the engine's out"),
        ("norm", 0, "norm: its rows 0 to 4, columns 0 to 0, in the engine's norm"),
    ],
)
def test_a_row_that_is_off_is_named(name, row, said, full):
    engine = Engine(1)
    attestor = engine.attestor()
    update(attestor, full=full)
    engine.held[name][row] += 1
    assert attestor.problems() == [said]


def test_one_number_is_seen_by_a_full_comparison_and_in_time_by_samples():
    engine = Engine(0)
    attestor = engine.attestor()
    engine.held["qk"][0, 3] += 1
    update(attestor, full=True)
    assert len(attestor.problems()) == 1
    seen = []
    for version in range(20):
        update(attestor, full=False, version=version)
        seen.append(len(attestor.problems()))
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("full", [False, True])
def test_old_weights_and_lost_numbers_are_noticed(full):
    engine = Engine(0)
    attestor = engine.attestor()
    update(attestor, full=full, weights={name: tensor + 1 for name, tensor in published().items()})
    assert len(attestor.problems()) == 4
    engine.held["norm"] = torch.full((5,), torch.nan)
    update(attestor, full=full)
    assert [problem.split(":")[0] for problem in attestor.problems()] == ["norm"]


def test_costly_parameters_take_turns():
    engine = Engine(0)
    costly = [dataclasses.replace(holding, is_costly=holding.name != "norm") for holding in engine.holdings()]
    attestor = Attestor(costly, lambda: {})
    for held in engine.held.values():
        held.add_(1)
    seen = []
    for full in (False, False, False, False, True):
        update(attestor, full=full, version=4)
        seen.append({problem.split(":")[0] for problem in attestor.problems()})
    assert seen == [{"q", "k", "norm"}, {"norm"}, {"norm"}, {"out", "norm"}, {"q", "k", "out", "norm"}]


@pytest.mark.parametrize(("row", "seen"), [(0, [True, True]), (1, [False, True])])
def test_no_update_may_change_a_buffer(row, seen):
    """Not all rows of a large table are looked at every time."""
    engine = Engine(0)
    attestor = engine.attestor()
    engine.buffers["angles"][row, 1] = 0
    for full, is_seen in zip((False, True), seen, strict=True):
        update(attestor, full=full)
        assert attestor.problems() == ["the buffer angles"] * is_seen


def test_a_parameter_that_nothing_was_sent_for_is_a_problem():
    attestor = Engine(0).attestor()
    dict(attestor.watch({"q": published()["q"]}.items(), version=1, full=False))
    problems = attestor.problems()
    assert [problem.split(":")[0] for problem in problems] == ["k", "out", "norm"]
    assert all("nothing was sent" in problem for problem in problems)


@pytest.mark.parametrize("full", [False, True])
def test_a_broken_policy_is_not_blamed_on_the_engine(full):
    engine = Engine(0)
    attestor = engine.attestor()
    broken = published() | {"norm": torch.full((5,), torch.nan)}
    engine.held["norm"] = broken["norm"].clone()
    update(attestor, full=full, weights=broken)
    assert all("the policy itself is broken" in problem for problem in attestor.problems())
    engine.held["qk"][0] += 1
    update(attestor, full=full)
    assert "broken" not in attestor.problems()[0]


@pytest.mark.parametrize("full", [False, True])
def test_numbers_that_a_product_takes_for_zero_are_zero(full):
    engine = Engine(0)
    attestor = engine.attestor()
    weights = published()
    weights["norm"][1], engine.held["norm"][1] = 1e-39, 0
    weights["norm"][2], engine.held["norm"][2] = 0.0, -0.0
    update(attestor, full=full, weights=weights)
    assert attestor.problems() == []


def test_the_ranks_together_hold_everything():
    attestors = [Engine(rank).attestor() for rank in (0, 1)]
    places = [place for attestor in attestors for place in attestor.places()]
    assert uncovered(SHAPES, places) == []
    assert uncovered(SHAPES, attestors[0].places()) == [
        "24 of the 48 numbers of q are held",
        "12 of the 24 numbers of k are held",
        "20 of the 40 numbers of out are held",
    ]
    assert uncovered({}, [Place("x", 0, 1, 0, 1)]) == ["x is not among the published weights"]
    overlapping = [Place("x", 0, 2, 0, 2), Place("x", 1, 1, 1, 1), Place("x", 3, 1, 0, 1)]
    assert ["overlap" in problem for problem in uncovered({"x": (3, 2)}, overlapping)] == [True]
    sums = add_up(pair for attestor in attestors for pair in attestor.sums())
    expected = {name: checksum(as_matrix(tensor)) for name, tensor in published().items()}
    assert {name: value % (1 << 64) for name, value in sums.items()} == expected


def test_two_copies_of_a_part_that_differ_have_no_digest():
    attestors = [Engine(0).attestor(), Engine(0).attestor()]
    pairs = [pair for attestor in attestors for pair in attestor.sums()]
    assert add_up(pairs) == add_up(attestors[0].sums())
    place, value = pairs[-1]
    with pytest.raises(UserError, match=r"two copies of Place.*norm.* differ"):
        add_up([*pairs, (place, value + 1)])
