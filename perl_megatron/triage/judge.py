"""The verdict on engine and trainer: which hypothesis reproduces their numbers.

A party agrees on a rollout if the reference, with the recorded ids and images, transformers' positions and the expected
weights, gives its log-probabilities up to rounding (``gaps``). On the other rollouts every hypothesis is tried: first
on a few of each kind, and those that reproduce one of these on all. The best explains most rollouts, and contradicts
fewest of the others. If it explains less than half of them, which may be chance where rounding is coarse, it is none;
then rounding of a lower precision is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from perl_megatron.triage.gaps import Side, Tolerance, explains, where_it_begins
from perl_megatron.triage.hypotheses import RIGHT, Hypothesis
from perl_megatron.triage.reference import Precision
from perl_megatron.triage.scoring import Party, Scoring
from perl_megatron.triage.verdicts import Cause, Tested, Verdict

LOWER: dict[Precision, Precision] = {"float32": "bfloat16", "bfloat16": "float8"}
"""What a party may have computed in, though it should not."""
NUM_PROBES = 4
"""Rollouts on which all hypotheses are tried."""

ENOUGH = 0.5
"""A verdict explains at least this share of the rollouts that do not agree."""

Gaps = dict[int, np.ndarray]
"""Case → float64 [R]."""


def judge(scoring: Scoring, party: Party, hypotheses: Iterable[Hypothesis]) -> Verdict:
    """The verdict on one party; ``hypotheses``, about its policy, are asked for only where there is a mismatch."""
    tolerance = scoring.tolerance(party, party.precision)
    plain = _try_on(scoring, party, RIGHT, party.members)
    wrong = [index for index, gaps in plain.items() if not tolerance.holds(gaps)]
    found: list[Tested] = []
    if wrong:
        tests = [_test(scoring, party, hypothesis, plain, wrong, tolerance) for hypothesis in hypotheses]
        found = sorted((each for each in tests if each), key=lambda each: (each.rank, each.mean))
    winners = [each for each in found if each.rank == found[0].rank and each.explained >= ENOUGH * len(wrong)]
    causes = tuple(dict.fromkeys(each.cause for each in winners if each.cause))
    if wrong and not winners:
        rounding = _lower_precision(scoring, party, plain, wrong)
        found += [rounding] if rounding else []
        winners = [rounding] if rounding and rounding.explained == len(wrong) else []
        causes = (Cause.KERNELS if winners else Cause.UNEXPLAINED,)
    return Verdict(
        party=party.name,
        policy=party.policy.name,
        precision=party.precision,
        causes=causes,
        winners=tuple(winners),
        tested=(_summary(RIGHT, plain, explained=0, broken=0), *found),
        num_rollouts=len(party.members),
        num_mismatched=len(wrong),
        tolerances=(tolerance.largest(), tolerance.mean()),
        where=where_it_begins([_side(scoring, index, plain[index], index in wrong) for index in plain], tolerance),
    )


def _test(
    scoring: Scoring,
    party: Party,
    hypothesis: Hypothesis,
    plain: Gaps,
    wrong: Sequence[int],
    tolerance: Tolerance,
) -> Tested | None:
    """On the probes; on all rollouts where it reproduces one of them. None where it changes nothing."""

    def count_explained(gaps: Gaps) -> int:
        return sum(explains(tolerance, gaps[index], plain[index]) for index in gaps if index in wrong)

    gaps = _try_on(scoring, party, hypothesis, _probes(scoring, wrong))
    if count_explained(gaps):
        gaps = _try_on(scoring, party, hypothesis, party.members)
    if not gaps:
        return None
    broken = sum(not tolerance.holds(gaps[index]) for index in gaps if index not in wrong)
    return _summary(hypothesis, gaps, explained=count_explained(gaps), broken=broken)


def _try_on(scoring: Scoring, party: Party, hypothesis: Hypothesis, members: Sequence[int]) -> Gaps:
    """Without the cases of which the hypothesis changes nothing."""
    gaps = {index: scoring.gaps(party, hypothesis, index) for index in members}
    return {index: each for index, each in gaps.items() if each is not None}


def _probes(scoring: Scoring, wrong: Sequence[int]) -> list[int]:
    """A few of different kinds: permuted ones and many images first, and long responses, which say most."""
    kinds: dict[tuple[bool, int], list[int]] = {}
    for index in sorted(wrong, key=lambda index: -len(scoring.cases[index].plain.response)):
        rollout = scoring.cases[index].rollout
        kinds.setdefault((not rollout.permuted, -len(rollout.image_keys)), []).append(index)
    queues = [kinds[kind] for kind in sorted(kinds)]
    turns = [queue[turn] for turn in range(len(wrong)) for queue in queues if turn < len(queue)]
    return turns[:NUM_PROBES]


def _lower_precision(scoring: Scoring, party: Party, plain: Gaps, wrong: Sequence[int]) -> Tested | None:
    """What a lower precision loses, and how many gaps are no larger; None where there is none lower."""
    lower = LOWER.get(party.precision)
    if lower is None:
        return None
    tolerance = scoring.tolerance(party, lower)
    explained = sum(tolerance.holds(plain[index]) for index in wrong)
    errors = dict(zip(party.members, scoring.errors(party, lower), strict=True))
    return _summary(Hypothesis(Cause.KERNELS, f"rounding of {lower}"), errors, explained=explained, broken=0)


def _summary(hypothesis: Hypothesis, gaps: Gaps, *, explained: int, broken: int) -> Tested:
    joined = np.concatenate(list(gaps.values()))
    known = joined[~np.isnan(joined)]
    return Tested(
        cause=hypothesis.cause,
        name=hypothesis.name,
        largest=float(known.max(initial=0.0)),
        mean=float(known.mean()) if len(known) else 0.0,
        num_rollouts=len(gaps),
        explained=explained,
        broken=broken,
    )


def _side(scoring: Scoring, index: int, gaps: np.ndarray, mismatched: bool) -> Side:
    rollout = scoring.cases[index].rollout
    return Side(len(rollout.image_keys), rollout.permuted, gaps, mismatched)
