"""Asking a benchmark: chunk by chunk, each answer scored and written before the next chunk, resumable.

All ranks call these functions together; only rank 0 touches the folder of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.data.permutation import apply_order
from perl_megatron.evaluation.asking import Asker, Reply
from perl_megatron.evaluation.benchmarks.benchmark import Benchmark
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.evaluation.benchmarks.scoring import SCORE_VERSION, Verdict, score_all
from perl_megatron.evaluation.output_log import OutputLog, question_digest
from perl_megatron.observability.progress import RunProgress
from perl_megatron.rollout.engine import Sampling
from perl_megatron.runtime.collective import gather_objects, rank, shared_batches

Row = dict[str, Any]


def run_benchmark(
    benchmark: Benchmark, items: Sequence[Item], asker: Asker, sampling: Sampling, folder: Path, *, chunk_size: int
) -> list[Row]:
    """The rows of all items, those that were there before included: ``sampling.num_rollouts`` for each, in order."""
    log = OutputLog(folder / f"{benchmark.name}.jsonl")
    rows = _known_rows(log, items, sampling.num_rollouts, chunk_size=chunk_size)
    waiting = [item for item in items if item.id not in rows]
    progress = None
    if rank() == 0:
        first = len(items) - len(waiting)
        progress = RunProgress(benchmark.title, len(items), first_step=first, unit="question")
    try:
        for start in range(0, len(waiting), chunk_size):
            chunk = waiting[start : start + chunk_size]
            answered = _answer(benchmark, chunk, asker, sampling)
            on_rank_zero(partial(log.append, answered), what="the answers")
            for row in answered:
                rows.setdefault(row["id"], []).append(row)
            if progress is not None:
                right = [row["correct"] for done in rows.values() for row in done]
                progress.step(len(rows), {"evaluation/accuracy": sum(right) / len(right)})
    finally:
        if progress is not None:
            progress.close()
    return [row for item in items for row in rows[item.id]]


def _answer(benchmark: Benchmark, chunk: Sequence[Item], asker: Asker, sampling: Sampling) -> list[Row]:
    """The scored rows of a chunk."""
    whole = [item for item in chunk if item.problem is None]
    views = [apply_order(item.record, range(len(item.record.images)), 0) for item in whole]
    asked = dict(zip((item.id for item in whole), asker.ask(views, sampling), strict=True))
    pairs = []
    for item in chunk:
        broken = [Reply("", "not asked", item.problem)] * sampling.num_rollouts
        pairs += [(item, number, reply) for number, reply in enumerate(asked.get(item.id, broken))]
    verdicts = shared_batches(_verdicts, [(item, reply.text, reply.problem) for item, _, reply in pairs])
    return [
        {
            "benchmark": benchmark.name,
            "id": item.id,
            "task": item.task,
            "cluster": item.cluster,
            "rollout": number,
            "order": list(range(len(item.record.images))),
            "prompt": item.record.text,
            "response": reply.text,
            "finish_reason": reply.finish_reason,
            "problem": reply.problem,
            "prediction": verdict.prediction,
            "expected": item.record.answer,
            "correct": verdict.correct,
            "score_version": SCORE_VERSION,
            "question_digest": question_digest(item.record),
        }
        for (item, number, reply), verdict in zip(pairs, verdicts, strict=True)
    ]


def _verdicts(answers: Sequence[tuple[Item, str, str | None]]) -> list[Verdict]:
    """The verdicts on (item, response, problem); an answer with a problem is wrong."""
    given = iter(score_all([(response, item) for item, response, problem in answers if problem is None]))
    return [next(given) if problem is None else Verdict(None, False) for _, _, problem in answers]


def _known_rows(log: OutputLog, items: Sequence[Item], num_rollouts: int, *, chunk_size: int) -> dict[str, list[Row]]:
    """The rows that need not be asked again, by item; those of an older scorer are scored again.

    Asked again is what got no answer, what has too few rollouts, and a question that is another one now.
    """
    read: list[Row] = []
    on_rank_zero(lambda: read.extend(log.read()), what="the answers")
    by_item: dict[str, dict[int, Row]] = {}
    for row in gather_objects(read)[0]:
        by_item.setdefault(row["id"], {})[row["rollout"]] = row
    known: dict[str, list[Row]] = {}
    for item in items:
        rows = [row for _, row in sorted(by_item.get(item.id, {}).items())]
        digest = question_digest(item.record)
        if len(rows) == num_rollouts and all(
            row["question_digest"] == digest and row["finish_reason"] not in ("error", "not asked") for row in rows
        ):
            known[item.id] = rows
    of_item = {item.id: item for item in items}
    old = [
        row
        for rows in known.values()
        for row in rows
        if row["score_version"] != SCORE_VERSION or row["expected"] != of_item[row["id"]].record.answer
    ]
    for start in range(0, len(old), chunk_size):
        _score_again(log, old[start : start + chunk_size], of_item)
    return known


def _score_again(log: OutputLog, rows: Sequence[Row], of_item: Mapping[str, Item]) -> None:
    """Change the verdicts of ``rows``, and append them to the log, whose readers take the last row of an answer."""
    answers = [(of_item[row["id"]], row["response"], row["problem"]) for row in rows]
    for row, verdict in zip(rows, shared_batches(_verdicts, answers), strict=True):
        row |= {"prediction": verdict.prediction, "correct": verdict.correct}
        row |= {"expected": of_item[row["id"]].record.answer, "score_version": SCORE_VERSION}
    on_rank_zero(partial(log.append, rows), what="the verdicts")
