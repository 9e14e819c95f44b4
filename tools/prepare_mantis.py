"""Prepare training questions as PeRL does: `python tools/prepare_mantis.py OUT source.path=FOLDER [section.key=value]`.

From a local copy of Mantis-Instruct to `OUT/records.jsonl`, which `perl-megatron train` reads: rules → open questions
rephrased as multiple choice → difficulty by rollouts of a policy → resampling to a histogram of difficulty → does the
order of the images change the answer? → permutation contract. The same command again goes on where it stopped, and a
changed setting redoes its stage and the later ones. `--dry-run` prints the prompts and the cost in tokens, and asks
nobody. All settings: docs/preparation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from perl_megatron.checkpoint.model_digest import model_digest
from perl_megatron.config.load import LoadedConfig, load_config, load_sections
from perl_megatron.errors import UserError
from perl_megatron.preparation.difficulty import Policy
from perl_megatron.preparation.estimate import StageCost, count_by_characters, estimate
from perl_megatron.preparation.pipeline import PERMUTABLE, RECORDS, STAGES, Pipeline
from perl_megatron.preparation.question import Outcome, Question
from perl_megatron.preparation.resample import Resampled
from perl_megatron.preparation.settings import PreparationSettings
from perl_megatron.preparation.stage_files import StageCounts

NUM_REASONS = 4
"""Reasons of a stage that the table shows; `counts.json` has all."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of all stages' files; made, or gone on with")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to do (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print prompts and the cost in tokens; asks nobody")
    parser.add_argument("--show", type=int, default=2, metavar="K", help="prompts of each stage to print (default: 2)")
    text = "folder of a Qwen2.5-VL checkpoint that counts the tokens of a dry run (default: 4 characters each)"
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=text)
    return parser.parse_intermixed_args(arguments)


@contextmanager
def engine_policy(loaded: LoadedConfig, pipeline: Pipeline, questions: list[Question]) -> Iterator[Policy]:
    """The policy of a run's config in its engine, in this one process."""
    from perl_megatron.build import build_encoder, build_engine, derive_for
    from perl_megatron.preparation.engine_policy import EnginePolicy
    from perl_megatron.runtime import platform, topology

    config, settings = loaded.config, pipeline.settings
    timeout = config.deadlines.collective_timeout
    place = topology.initialize(config.parallel, seed=config.run.seed, timeout_seconds=timeout)
    platform.set_threads()
    try:
        encoder = build_encoder(config)
        max_images = max((len(question.images) for question in questions), default=0)
        engine = build_engine(config, derive_for(config, place.world_size, "eval"), encoder, place, max_images)
        try:
            yield EnginePolicy(
                engine,
                encoder,
                settings.difficulty,
                pipeline.folder,
                max_prompt_tokens=config.data.max_prompt_tokens,
                seed=settings.output.seed,
            )
        finally:
            engine.close()
    finally:
        topology.shutdown()


def make_pipeline(settings: PreparationSettings, folder: Path, bar: Progress) -> Pipeline:
    def watch(stage: str, outcomes: Iterable[Outcome], total: int | None) -> Iterator[Outcome]:
        task = bar.add_task(stage, total=total)
        for outcome in outcomes:
            yield outcome
            bar.advance(task)

    policy = settings.difficulty.policy
    if policy is None:
        return Pipeline(settings, folder, watch=watch)
    loaded = load_config(policy, [f"rollout.max_response_tokens={settings.difficulty.max_response_tokens}"])
    config = loaded.config
    mark = [model_digest(config.model.path), config.model.dtype, config.data.model_dump(mode="json", exclude={"train"})]
    pipeline = Pipeline(
        settings,
        folder,
        make_policy=lambda questions: engine_policy(loaded, pipeline, questions),
        policy_mark=mark,
        watch=watch,
    )
    return pipeline


def counts_table(counts: dict[str, StageCounts]) -> Table:
    table = Table("stage", "in", "out", "dropped", "because", title="questions")
    for name, count in counts.items():
        reasons = [f"{reason} ({number:,})" for reason, number in count.dropped.most_common(NUM_REASONS)]
        more = len(count.dropped) - NUM_REASONS
        reasons += [f"and {more} more reasons"] if more > 0 else []
        table.add_row(name, f"{count.num_in:,}", f"{count.kept:,}", f"{count.dropped.total():,}", "\n".join(reasons))
    return table


def difficulty_table(result: Resampled) -> Table:
    title = f"accuracy: mean {result.mean_before:.2f} before, {result.mean_after:.2f} after"
    table = Table("accuracy", "before", "wanted", "after", title=title)
    size = sum(result.counts)
    for number, accuracy in enumerate(result.accuracies):
        short = "  (too few)" if number in result.short else ""
        before, after = result.available[number], result.counts[number]
        table.add_row(f"{accuracy:.2f}", f"{before:,}", f"{result.target[number]:.1%}", f"{after / size:.1%}{short}")
    return table


def cost_table(costs: list[StageCost], counted: str) -> Table:
    table = Table("stage", "requests", "text tokens", "image tokens", "replies", "reply tokens, at most", title=counted)
    for cost in costs:
        if cost.is_done:
            table.add_row(cost.stage, "finished", "", "", "", "")
        else:
            values = (cost.num_requests, cost.text_tokens, cost.image_tokens, cost.num_replies, cost.reply_tokens)
            table.add_row(cost.stage, *(f"{value:,}" for value in values))
    return table


def tokenizer_of(folder: Path | None) -> tuple[Callable[[str], int], str]:
    """What counts tokens, and its description."""
    if folder is None:
        return count_by_characters, "cost (text: one token for 4 characters)"
    from perl_megatron.data.processor import PromptEncoder

    tokenizer = PromptEncoder(folder, system_prompt="").tokenizer
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids), f"cost (text by {folder})"


def dry_run(pipeline: Pipeline, options: argparse.Namespace, console: Console) -> None:
    def show(stage: str, identifier: str, prompt: str) -> None:
        console.rule(f"{stage}: {identifier}")
        console.print(prompt, markup=False, highlight=False, soft_wrap=True)

    count_tokens, description = tokenizer_of(options.tokenizer)
    costs = estimate(pipeline, num_shown=options.show, count_tokens=count_tokens, show=show)
    console.print(cost_table(costs, description))


def report(pipeline: Pipeline, console: Console) -> None:
    console.print(counts_table(pipeline.counts))
    if pipeline.resampled is not None:
        console.print(difficulty_table(pipeline.resampled))
    if pipeline.put_aside is not None:
        console.print(f"files of other settings: {pipeline.put_aside}")
    if "contract" in pipeline.counts:
        permutable = pipeline.contract_counts()
        console.print(f"images may change their order in {permutable.pop(PERMUTABLE, 0):,} records", highlight=False)
        for reason, number in permutable.most_common(NUM_REASONS):
            console.print(f"  not in {number:,}: {reason}", markup=False, highlight=False)
        console.print(f"records: {pipeline.folder / RECORDS}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        settings, _ = load_sections(PreparationSettings, options.settings, options.overrides)
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            pipeline = make_pipeline(settings, options.out, bar)
            if options.dry_run:
                dry_run(pipeline, options, console)
                return 0
            try:
                pipeline.run(options.until)
            finally:
                bar.stop()
                report(pipeline, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
