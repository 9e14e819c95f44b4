"""Held-out evaluation: every question in several image orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from perl_megatron.config.schema import Config
from perl_megatron.data.planner import evaluation_views
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.evaluation.asking import Asker, EngineAsker, Reply, evaluation_sampling
from perl_megatron.evaluation.order_bias import OrderBias, ViewOutcome, order_bias
from perl_megatron.evaluation.slots import answered_slot, expected_slot, queried_slot
from perl_megatron.observability.json_lines import write_rows
from perl_megatron.reward.score import total
from perl_megatron.reward.scorer import Response, rule_parts
from perl_megatron.rollout.engine import RolloutEngine
from perl_megatron.runtime.collective import shared_batches
from perl_megatron.types import PermutationContract, Record, View


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation."""

    bias: OrderBias
    outputs: list[dict[str, Any]]
    """One row for each answer: record, order, expected answer, response, whether it was right."""
    outcomes: tuple[ViewOutcome, ...] = ()
    """The same without texts, for the order-bias report."""

    def metrics(self) -> dict[str, float]:
        """What is logged (names: ``observability/metrics.py``)."""
        rates = {"": self.bias.overall, **{f"/{kind}": kind_rates for kind, kind_rates in self.bias.by_kind.items()}}
        metrics = {f"evaluation/accuracy{suffix}": value.accuracy for suffix, value in rates.items()}
        metrics |= {f"evaluation/flip_rate{suffix}": value.flip_rate for suffix, value in rates.items()}
        metrics["evaluation/num_questions"] = float(self.bias.overall.num_records)
        metrics["evaluation/num_views"] = float(self.bias.overall.num_views)
        return metrics

    def table(self, *, title: str) -> Table:
        """Accuracy and flip rate by question kind, for a terminal."""
        table = Table("questions", "accuracy", "flip rate", "asked", "views", title=title)
        for name, rates in (*self.bias.by_kind.items(), ("all", self.bias.overall)):
            counts = (str(rates.num_records), str(rates.num_views))
            table.add_row(escape(name), f"{rates.accuracy:.1%}", f"{rates.flip_rate:.1%}", *counts)
        return table

    def write(self, path: Path) -> None:
        """Write all raw outputs as JSON lines; an earlier file is replaced only by the whole new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, self.outputs)


def evaluate(config: Config, records: Sequence[Record], encoder: PromptEncoder, engine: RolloutEngine) -> Evaluation:
    """``evaluate_by`` a rollout engine, of records that were checked when they were read."""
    return evaluate_by(EngineAsker(config, encoder, engine, checked=True), config, records)


def evaluate_by(
    asker: Asker, config: Config, records: Sequence[Record], *, on_chunk: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Ask each record in up to `evaluation.num_orders` image orders and grade the answers (by default greedy ones).

    The orders depend on `run.seed` and the record only, so evaluations of one run are comparable view by view. All
    views are asked at once; with ``on_chunk`` `evaluation.chunk_size` of them, and before and after each chunk it is
    told how many of how many are answered.
    """
    views: list[View] = []
    contracts: list[PermutationContract] = []
    for record in records[: config.evaluation.max_records]:
        mine = evaluation_views(record, num_orders=config.evaluation.num_orders, seed=config.run.seed)
        views += mine
        contracts += [record.contract] * len(mine)
    replies: list[list[Reply]] = []
    chunk_size = len(views) if on_chunk is None else config.evaluation.chunk_size
    if on_chunk is not None:
        on_chunk(0, len(views))
    while len(replies) < len(views):
        replies += asker.ask(views[len(replies) : len(replies) + chunk_size], evaluation_sampling(config))
        if on_chunk is not None:
            on_chunk(len(replies), len(views))
    answers = [
        (view, contract, number, reply)
        for view, contract, of_view in zip(views, contracts, replies, strict=True)
        for number, reply in enumerate(of_view)
    ]

    def grade(mine: Sequence[tuple[View, PermutationContract, int, Reply]]) -> list[tuple[bool, float]]:
        responses = [Response(reply.text, view, reply.finish_reason) for view, _, _, reply in mine]
        parts_of_all = rule_parts(responses, config.reward)
        return [(parts["accuracy"] == 1, total(parts, config.reward)) for parts in parts_of_all]

    grades = shared_batches(grade, answers)
    outcomes, outputs = [], []
    for (view, contract, number, reply), (correct, reward) in zip(answers, grades, strict=True):
        answer_slot = expected_slot(view, contract)
        outcome = ViewOutcome(
            record_id=view.record_id,
            kind=view.kind,
            order=view.order,
            correct=correct,
            slot=queried_slot(view, contract) if answer_slot is None else answer_slot,
            rollout=number,
            reward=reward,
            answered_slot=answered_slot(reply.text, view, contract),
        )
        outcomes.append(outcome)
        outputs.append(_row(view, reply, outcome))
    return Evaluation(order_bias(outcomes), outputs, tuple(outcomes))


def _row(view: View, reply: Reply, outcome: ViewOutcome) -> dict[str, Any]:
    """What is kept of one answer."""
    return {
        "record": view.record_id,
        "kind": view.kind,
        "order": list(view.order),
        "rollout": outcome.rollout,
        "question": view.text,
        "answer": view.answer,
        "response": reply.text,
        "finish_reason": reply.finish_reason,
        "problem": reply.problem,
        "correct": outcome.correct,
        "reward": outcome.reward,
        "slot": outcome.slot,
        "answered_slot": outcome.answered_slot,
    }
