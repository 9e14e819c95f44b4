"""How the variance of the reward splits: between questions, between image orders of a question, and within an order.

A reward r of question q, order o, rollout k is taken as r = μ + Q_q + O_qo + E_qok with independent effects: a nested
random-effects model. Two answers are given to "how much is due to the order?":

- sums of squares over all rewards, which add up exactly: Σ(r - r̄)² = Σ(r̄_q - r̄)² + Σ(r̄_qo - r̄_q)² + Σ(r - r̄_qo)².
  They describe these answers; the middle one also holds sampling noise that few rollouts did not average out.
- unbiased estimates of the components σ²_Q, σ²_O, σ²_E: the analysis of variance with unequal numbers (Searle, Casella
  & McCulloch 1992, section 5.3; Henderson's method 1), where each mean square is set equal to its expectation. They
  describe the policy; an unbiased estimate of a small component can be negative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RewardCase:
    """One reward."""

    question: str
    order: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class VarianceSplit:
    """Sums of squares, degrees of freedom and variance components."""

    num_rewards: int
    total_squares: float
    question_squares: float
    """Between questions."""
    order_squares: float
    """Between the orders of a question."""
    sampling_squares: float
    """Between the rollouts of one order."""
    question_freedom: int
    order_freedom: int
    sampling_freedom: int
    question_variance: float | None
    """σ²_Q; None where it cannot be estimated, as below."""
    order_variance: float | None
    """σ²_O: None where no question has two orders, or where one rollout of each order was sampled (the two are then
    one: ``order_squares / order_freedom`` estimates σ²_O + σ²_E)."""
    sampling_variance: float | None
    """σ²_E: 0 for greedy answers."""


def split_variance(cases: Iterable[RewardCase], *, greedy: bool) -> VarianceSplit:
    """Split the variance of rewards. ``greedy``: answers do not vary within an order."""
    rewards: defaultdict[str, defaultdict[tuple[int, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        rewards[case.question][case.order].append(case.value)
    questions = [[np.array(values, dtype=np.float64) for values in orders.values()] for orders in rewards.values()]
    assert questions, "there are no rewards"
    every = np.concatenate([values for orders in questions for values in orders])
    n = len(every)
    n_q = np.array([sum(map(len, orders)) for orders in questions], dtype=np.float64)
    mean_q = np.array([np.concatenate(orders).mean() for orders in questions])
    question_squares = float((n_q * (mean_q - every.mean()) ** 2).sum())
    order_squares = sum(
        len(values) * (values.mean() - mean) ** 2
        for mean, orders in zip(mean_q, questions, strict=True)
        for values in orders
    )
    sampling_squares = sum(((values - values.mean()) ** 2).sum() for orders in questions for values in orders)
    num_orders = sum(map(len, questions))
    freedom = (len(questions) - 1, num_orders - len(questions), n - num_orders)

    # Coefficients of the expected mean squares: E[MS_O] = σ²_E + a σ²_O, E[MS_Q] = σ²_E + b σ²_O + c σ²_Q.
    squared = np.array([sum(len(values) ** 2 for values in orders) for orders in questions], dtype=np.float64)
    within = float((squared / n_q).sum())
    sampling = 0.0 if greedy else _ratio(sampling_squares, freedom[2])
    between_orders = _ratio(order_squares, freedom[1])
    order = question = None
    if sampling is not None and between_orders is not None:
        order = (between_orders - sampling) / ((n - within) / freedom[1])
    between_questions = _ratio(question_squares, freedom[0])
    if sampling is not None and order is not None and between_questions is not None:
        b = (within - squared.sum() / n) / freedom[0]
        c = (n - (n_q**2).sum() / n) / freedom[0]
        question = (between_questions - sampling - b * order) / c
    return VarianceSplit(
        num_rewards=n,
        total_squares=float(((every - every.mean()) ** 2).sum()),
        question_squares=question_squares,
        order_squares=float(order_squares),
        sampling_squares=float(sampling_squares),
        question_freedom=freedom[0],
        order_freedom=freedom[1],
        sampling_freedom=freedom[2],
        question_variance=question,
        order_variance=order,
        sampling_variance=sampling,
    )


def _ratio(squares: float, freedom: int) -> float | None:
    return float(squares) / freedom if freedom > 0 else None
