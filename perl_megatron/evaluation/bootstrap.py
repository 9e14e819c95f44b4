"""Confidence intervals of accuracies by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13).

Questions are resampled, not answers: the rollouts or versions of one question stay together (a cluster). Clusters are
drawn with replacement among those that are asked in the same tasks, so that every task keeps its size; the accuracy is
then computed anew from the counts. A draw is a vector of multinomial weights, so that all of them are one matrix
product: with weights w [B, C] and right answers s [C, T] of C clusters in T tasks, w·s are B tables of T tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perl_megatron.runtime.rng import generator

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_WEIGHTS = 2**22
"""Weights that are drawn at once: they bound the memory."""


@dataclass(frozen=True)
class Answer:
    """One answer, right (1) or wrong (0), or anything between."""

    task: str
    cluster: str
    """The question: answers with the same cluster are not independent of each other."""
    value: float


@dataclass(frozen=True)
class Estimate:
    """A mean with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Accuracies:
    """Accuracy by task and in all."""

    by_task: Mapping[str, Estimate]
    micro: Estimate
    """Over all answers."""
    macro: Estimate
    """The mean of the tasks' accuracies."""


def bootstrap(
    answers: Sequence[Answer], *, seed: int, num_resamples: int = NUM_RESAMPLES, confidence: float = CONFIDENCE
) -> Accuracies:
    """Accuracies and their intervals; the same ones at every call.

    Where all clusters of a task (or all together) have the same mean of 0 or 1, resampling would claim certainty. Its
    interval is then the exact binomial one (Clopper & Pearson 1934): with C of C right, the lower bound is
    ((1 - confidence) / 2)^(1 / C).
    """
    assert answers, "there are no answers"
    assert 0 < confidence < 1
    tasks = sorted({answer.task for answer in answers})
    sums, counts, strata = _tables(answers, tasks)
    total_sums, total_counts = sums.sum(axis=0), counts.sum(axis=0)
    drawn = _resample(sums, counts, strata, num_resamples, seed)
    by_task, micro = drawn[0] / drawn[1], drawn[0].sum(axis=1) / drawn[1].sum(axis=1)
    exact = total_sums / total_counts
    in_task = (counts > 0).sum(axis=0)

    def estimate(value: float, resampled: np.ndarray, num_clusters: int) -> Estimate:
        tail = (1 - confidence) / 2
        low, high = (float(bound) for bound in np.quantile(resampled, (tail, 1 - tail)))
        if value >= 1:
            low = tail ** (1 / num_clusters)
        elif value <= 0:
            high = 1 - tail ** (1 / num_clusters)
        return Estimate(float(value), min(low, float(value)), max(high, float(value)))

    return Accuracies(
        by_task={
            task: estimate(exact[index], by_task[:, index], int(in_task[index])) for index, task in enumerate(tasks)
        },
        micro=estimate(total_sums.sum() / total_counts.sum(), micro, len(sums)),
        macro=estimate(exact.mean(), by_task.mean(axis=1), len(sums)),
    )


def paired_difference(
    first: Sequence[Answer],
    second: Sequence[Answer],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> dict[str, Estimate]:
    """'micro' and 'macro' of ``second`` minus ``first``, both asked the same questions: each draw takes the same ones.

    Questions that only one of them has are left out by the caller.
    """
    tasks = sorted({answer.task for answer in first})
    tables = [_tables(answers, tasks) for answers in (first, second)]
    assert tables[0][2] == tables[1][2], "the two have other questions"
    micro, macro, exact = [], [], []
    for sums, counts, strata in tables:
        drawn = _resample(sums, counts, strata, num_resamples, seed)  # the same seed: the same questions
        micro.append(drawn[0].sum(axis=1) / drawn[1].sum(axis=1))
        macro.append((drawn[0] / drawn[1]).mean(axis=1))
        by_task = sums.sum(axis=0) / counts.sum(axis=0)
        exact.append((sums.sum() / counts.sum(), by_task.mean()))
    tail = (1 - confidence) / 2
    estimates = {}
    for index, (name, drawn_pair) in enumerate((("micro", micro), ("macro", macro))):
        low, high = np.quantile(drawn_pair[1] - drawn_pair[0], (tail, 1 - tail))
        estimates[name] = Estimate(float(exact[1][index] - exact[0][index]), float(low), float(high))
    return estimates


def _tables(
    answers: Sequence[Answer], tasks: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, ...], ...]]:
    """Sum and number of values [C, T] of each cluster in each task; clusters that are in the same tasks, together."""
    column = {task: index for index, task in enumerate(tasks)}
    clusters = {cluster: index for index, cluster in enumerate(sorted({answer.cluster for answer in answers}))}
    sums, counts = np.zeros((len(clusters), len(tasks))), np.zeros((len(clusters), len(tasks)))
    for answer in answers:
        place = clusters[answer.cluster], column[answer.task]
        sums[place] += answer.value
        counts[place] += 1
    strata: defaultdict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(counts > 0):
        strata[row.tobytes()].append(index)
    return sums, counts, tuple(tuple(members) for members in strata.values())


def _resample(
    sums: np.ndarray, counts: np.ndarray, strata: Sequence[Sequence[int]], num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of values [B, T] of B draws."""
    drawn_sums, drawn_counts = np.zeros((2, num_resamples, sums.shape[1]))
    for number, members in enumerate(strata):
        rows = list(members)
        tasks = counts[rows[0]] > 0
        random = generator(seed, "bootstrap", number)
        step = max(1, MAX_WEIGHTS // len(rows))
        for start in range(0, num_resamples, step):
            size = min(step, num_resamples - start)
            weights = _weights(random, size, len(rows))
            part = slice(start, start + size)
            drawn_sums[part, tasks] += weights @ sums[np.ix_(rows, tasks)]
            drawn_counts[part, tasks] += weights @ counts[np.ix_(rows, tasks)]
    return drawn_sums, drawn_counts


def _weights(random: np.random.Generator, size: int, num_clusters: int) -> np.ndarray:
    """float64 [size, C]: how often each cluster is among C drawn ones (much faster than ``random.multinomial``)."""
    drawn = random.integers(0, num_clusters, size=(size, num_clusters))
    drawn += np.arange(size)[:, None] * num_clusters
    counts = np.bincount(drawn.ravel(), minlength=size * num_clusters)
    return counts.reshape(size, num_clusters).astype(np.float64)
