"""Held-out evaluation: every question, greedily, in several image orders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from perl_megatron.config.schema import Config
from perl_megatron.data.planner import evaluation_views
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.evaluation.order_bias import OrderBias, ViewOutcome, order_bias
from perl_megatron.reward.score import score
from perl_megatron.rollout.engine import RolloutEngine, Sampling
from perl_megatron.runtime.collective import shared_map
from perl_megatron.types import Record, Rollout, View


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation."""

    bias: OrderBias
    outputs: list[dict[str, Any]]
    """One row for each view: record, order, expected answer, response, whether it was right."""

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
            table.add_row(name, f"{rates.accuracy:.1%}", f"{rates.flip_rate:.1%}", *counts)
        return table

    def write(self, path: Path) -> None:
        """Write all raw outputs as JSON lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.outputs))


def evaluate(config: Config, records: Sequence[Record], encoder: PromptEncoder, engine: RolloutEngine) -> Evaluation:
    """Ask each record in up to `evaluation.num_orders` image orders and grade the greedy answers.

    The orders depend on `run.seed` and the record only, so evaluations of one run are comparable view by view.
    """
    views: list[View] = []
    for record in records[: config.evaluation.max_records]:
        views += evaluation_views(record, num_orders=config.evaluation.num_orders, seed=config.run.seed)
    prompts = [encoder.encode(view) for view in views]
    greedy = Sampling(num_rollouts=1, temperature=0.0, top_p=1.0, max_tokens=config.rollout.max_response_tokens)
    rollouts = engine.generate(views, prompts, greedy, seeds=[0] * len(views))

    def is_right(pair: tuple[Rollout, View]) -> bool:
        rollout, view = pair
        return score(rollout.text, view, rollout.finish_reason, config.reward)["accuracy"] == 1

    right = shared_map(is_right, list(zip(rollouts, views, strict=True)))
    outcomes = [
        ViewOutcome(record_id=view.record_id, kind=view.kind, order=view.order, correct=correct)
        for view, correct in zip(views, right, strict=True)
    ]
    outputs = [
        {
            "record": view.record_id,
            "kind": view.kind,
            "order": list(view.order),
            "question": view.text,
            "answer": view.answer,
            "response": rollout.text,
            "correct": correct,
        }
        for view, rollout, correct in zip(views, rollouts, right, strict=True)
    ]
    return Evaluation(order_bias(outcomes), outputs)
