"""`perl-megatron eval`: held-out records in several image orders, or benchmarks, by an engine or an endpoint."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from perl_megatron.build import build_encoder, build_engine, derive_for
from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.config.schema import Config, PermutationConfig
from perl_megatron.data.image_store import ImageStore
from perl_megatron.data.records import Dataset, read_records
from perl_megatron.errors import UserError
from perl_megatron.evaluation.asking import Asker, EndpointAsker, EngineAsker, evaluation_sampling
from perl_megatron.evaluation.benchmark_results import (
    BenchmarkResult,
    markdown,
    render,
    summarize,
    write_results,
)
from perl_megatron.evaluation.benchmark_run import run_benchmark
from perl_megatron.evaluation.benchmarks.benchmark import load_items
from perl_megatron.evaluation.benchmarks.item import Item
from perl_megatron.evaluation.benchmarks.registry import BENCHMARKS, local_copies
from perl_megatron.evaluation.evaluate import Evaluation, evaluate_by
from perl_megatron.evaluation.kept_answers import KeptAnswers
from perl_megatron.evaluation.order_report import order_report
from perl_megatron.evaluation.output_log import OutputLog, answer_settings, open_folder, output_folder
from perl_megatron.evaluation.paper_table import PUBLISHED, own_row
from perl_megatron.evaluation.paper_table import markdown as paper_markdown
from perl_megatron.evaluation.watched_asker import EvaluationStopped, WatchedAsker
from perl_megatron.launch.failures import stop_status
from perl_megatron.observability.order_bias_plot import plot_order_bias
from perl_megatron.observability.progress import RunProgress
from perl_megatron.questions import most_images, read_questions
from perl_megatron.record_check import check_answer
from perl_megatron.rollout.engine import RolloutEngine
from perl_megatron.runtime.collective import rank
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.topology import Topology
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.types import Record

logger = logging.getLogger(__name__)

BENCHMARK_ANSWERS, UNFINISHED = "benchmarks", "unfinished"
"""Kinds of answers on the disk (``output_folder``)."""
WIDTH = 120
"""Of what is printed where there is no terminal."""


def by_engine(config: Config, place: Topology, *, watchdog: Watchdog, stop: StopRequest) -> int:
    """Evaluate `model.path` in the engine of `rollout.engine`; the exit status. Called by all ranks."""
    with watchdog.phase("start"):
        engine, asker, benchmarks, records = _prepare(config, place)
    try:
        with WatchedAsker(asker, watchdog=watchdog, stop=stop) as watched:
            _evaluate(config, watched, benchmarks, records)
    except EvaluationStopped:
        if place.rank == 0:
            logger.info("stopped as it was told to; the same command goes on from the answers that are there")
        return stop_status()
    finally:
        engine.close()
    return 0


def _prepare(
    config: Config, place: Topology
) -> tuple[RolloutEngine, Asker, Mapping[str, Sequence[Item]], Sequence[Record]]:
    """The engine, what asks it, and the benchmarks or records that it is asked."""
    derived = derive_for(config, place.world_size, "eval")
    encoder = build_encoder(config)
    benchmarks = _load_benchmarks(config) if config.evaluation.benchmarks else {}
    records: Sequence[Record] = (
        [item.record for items in benchmarks.values() for item in items]
        if benchmarks
        else read_questions(config, config.data.evaluation, "data.evaluation", encoder)
    )
    engine = build_engine(config, derived, encoder, place, most_images(records, PermutationConfig()))
    return engine, EngineAsker(config, encoder, engine, checked=not benchmarks), benchmarks, records


def by_endpoint(config: Config) -> int:
    """Evaluate the model behind `endpoint.url`, in this one process; the exit status."""
    benchmarks = _load_benchmarks(config) if config.evaluation.benchmarks else {}
    records = () if benchmarks else _readable_records(config)
    from perl_megatron.chat.client import ChatClient  # as in reward/judge.py

    with ChatClient(config.endpoint) as client:
        _evaluate(config, EndpointAsker(config, client), benchmarks, records)
    return 0


def _evaluate(
    config: Config, asker: Asker, benchmarks: Mapping[str, Sequence[Item]], records: Sequence[Record]
) -> None:
    who = asker.name if config.evaluation.ask == "endpoint" else f"{config.model.path}, {asker.name}"
    if benchmarks:
        _run_benchmarks(config, asker, benchmarks, who)
        return
    settings = answer_settings(config, asker.name)
    on_rank_zero(lambda: _open(config, settings, UNFINISHED), what="the folder of the answers")
    folder = output_folder(config, UNFINISHED)
    kept = KeptAnswers(asker, OutputLog(folder / "answers.jsonl"))
    with _ViewProgress(config.run.name) as progress:
        result = evaluate_by(kept, config, records, on_chunk=progress.show)
    on_rank_zero(lambda: _report_records(config, result, who), what="the evaluation")
    if all(row["finish_reason"] != "error" for row in result.outputs):  # else the same command asks those again
        on_rank_zero(lambda: shutil.rmtree(folder), what="the folder of the answers")


class _ViewProgress:
    """The progress over views, on rank 0. A context manager."""

    def __init__(self, name: str):
        self._name = name
        self._progress: RunProgress | None = None

    def show(self, done: int, total: int) -> None:
        """``done`` of ``total`` views are answered."""
        if self._progress is not None:
            self._progress.step(done, {})
        elif rank() == 0:
            self._progress = RunProgress(self._name, total, first_step=done, unit="view")

    def __enter__(self) -> _ViewProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()


def _report_records(config: Config, result: Evaluation, who: str) -> None:
    """Print held-out accuracy and order bias, and write all of it beside the run's folder.

    An earlier evaluation under the same `run.name` is replaced.
    """
    stem = config.run.directory / f"{config.run.name}.evaluation.jsonl"
    result.write(stem)
    report = order_report(result.outcomes, greedy=config.evaluation.temperature == 0, seed=config.run.seed)
    json_file, picture = (stem.with_name(f"{config.run.name}.order_bias{suffix}") for suffix in (".json", ".png"))
    report.write(json_file)
    plot_order_bias(report.to_dict(), picture, title=config.run.name)
    console = Console()
    console.print(result.table(title=escape(who)))
    console.print(report.render())
    problems = Counter(row["problem"] for row in result.outputs if row["problem"] is not None)
    for problem, count in problems.most_common():
        logger.warning("%d answers are missing and count as wrong: %s", count, problem)
    console.print(f"all answers: {stem}", markup=False)
    console.print(f"order bias:  {json_file}, {picture}", markup=False)


def _load_benchmarks(config: Config) -> dict[str, list[Item]]:
    """The items of the chosen benchmarks, by name; every rank reads them."""
    copies = local_copies(config.evaluation.benchmarks, config.evaluation.benchmark_folder)
    store = ImageStore(config.run.directory / "images")
    return {
        name: load_items(BENCHMARKS[name], path, store)[: config.evaluation.max_records]
        for name, path in copies.items()
    }


def _run_benchmarks(config: Config, asker: Asker, benchmarks: Mapping[str, Sequence[Item]], who: str) -> None:
    settings = answer_settings(config, asker.name)
    on_rank_zero(lambda: _open(config, settings, BENCHMARK_ANSWERS), what="the folder of the answers")
    folder, sampling = output_folder(config, BENCHMARK_ANSWERS), evaluation_sampling(config)
    results: dict[str, BenchmarkResult] = {}
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for name, items in benchmarks.items():
        benchmark = BENCHMARKS[name]
        rows = run_benchmark(benchmark, items, asker, sampling, folder, chunk_size=config.evaluation.chunk_size)
        results[name] = summarize(benchmark, items, rows, seed=config.run.seed, limit=config.evaluation.max_records)
        if rank() == 0:
            console.print(render(results[name]))
            for reason, count in results[name].most_common_reasons()[:10]:
                logger.warning("%s: %d questions have no answer and count as wrong: %s", benchmark.title, count, reason)
    on_rank_zero(lambda: _write_benchmarks(folder, who, settings, results), what="the results")
    if rank() == 0:
        console.print(f"all answers and results: {folder}", markup=False)


def _open(config: Config, settings: dict[str, object], kind: str) -> None:
    open_folder(config, settings, kind)


def _write_benchmarks(
    folder: Path, who: str, settings: Mapping[str, object], results: Mapping[str, BenchmarkResult]
) -> None:
    write_results(folder / "results.json", who, settings, results)
    parts = [f"# {who}\n", *(markdown(result) for result in results.values())]
    parts += ["## Beside the paper\n", paper_markdown([*PUBLISHED, own_row(folder)])]
    (folder / "results.md").write_text("\n".join(parts), encoding="utf-8")


def _readable_records(config: Config) -> tuple[Record, ...]:
    """The records of `data.evaluation` whose answers can be graded; without a policy, prompts have no length."""
    assert config.data.evaluation is not None, "checked before the start"
    path, data = config.data.evaluation, config.data
    dataset: Dataset = read_records(
        path, max_corrupt_fraction=data.max_corrupt_fraction, follow_links=data.follow_links
    )
    kept = []
    for record in dataset.records:
        try:
            check_answer(record)
            kept.append(record)
        except UserError as error:
            logger.warning("dropped %s: %s", record.source, error.what)
    for dropped in dataset.dropped:
        logger.warning("dropped %s", dropped)
    if not kept:
        raise UserError("no record is left", where=f"data.evaluation = {config.data.evaluation}")
    return tuple(kept)
