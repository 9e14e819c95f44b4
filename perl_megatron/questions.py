"""The questions of a config, read and checked: all of them before the run, or those of large sets as they are drawn."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.config.schema import Config, PermutationConfig
from perl_megatron.data.links import link_problem
from perl_megatron.data.node_folder import turn_on_node
from perl_megatron.data.permutation import apply_order
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.question_stream import DrawChecks, LookAhead, QuestionStream
from perl_megatron.data.record_files import RecordFiles, open_record_files, record_files
from perl_megatron.data.records import Dataset, DroppedRecord, read_records
from perl_megatron.data.recover_order import most_images_asked
from perl_megatron.data.sampler import make_sampler
from perl_megatron.errors import UserError
from perl_megatron.record_check import check_answer
from perl_megatron.runtime.collective import gather_objects, rank, together
from perl_megatron.types import Record

logger = logging.getLogger(__name__)

AUTO_LOAD_BYTES = 2 * 2**20
"""With `data.check=auto`, larger files of records are checked as they are drawn."""
MAX_INDEX_PROCESSES = 8
"""That one rank starts to check the records of a new file; the others wait for it."""


def training_questions(config: Config, encoder: PromptEncoder, *, demonstrations: bool = False) -> QuestionStream:
    """The stream of the questions of `data.train`; with ``demonstrations`` only of those that have one.

    Raises:
        UserError: there are none, too many cannot be used, or a path cannot be read.
    """
    paths = record_files(config.data.train, key="data.train")
    if not paths:
        raise UserError("data.train has to be set", where="data.train", fix="data.train=FILE.jsonl")
    if _checked_at_load(config, paths):
        parts = [read_questions(config, path, "data.train", encoder) for path in paths]
        if demonstrations:
            parts = [tuple(record for record in part if record.demonstration is not None) for part in parts]
        sizes = _sizes(paths, [len(part) for part in parts])
        records = tuple(record for part in parts for record in part)
        _refuse_repeats(records)
        sampler = make_sampler(sizes, config.data.weights, config.run.seed)
        return QuestionStream(records, sampler, look_ahead=_decoded_ahead(config, encoder, demonstrations))

    files = _open(config, paths)
    if demonstrations:
        files = files.with_demonstration()

    def problem(record: Record) -> str | None:
        linked = None if config.data.follow_links else link_problem(record)
        return linked or problem_of(record, config.data.max_prompt_tokens, encoder)

    checks = DrawChecks(
        problem,
        config.data.max_corrupt_fraction,
        where=", ".join(map(str, config.data.train)),
    )
    sampler = make_sampler(_sizes(paths, files.sizes), config.data.weights, config.run.seed)
    return QuestionStream(files, sampler, checks, _decoded_ahead(config, encoder, demonstrations))


def read_questions(config: Config, path: Path | None, key: str, encoder: PromptEncoder) -> tuple[Record, ...]:
    """The good records of a file, the same ones on every rank. Collective.

    Those with too long a prompt are dropped too. All dropped ones are named; what one rank cannot use, none uses.

    Raises:
        UserError: the file is not set, has too many corrupt records, or none is left; on every rank.
    """
    if path is None:
        raise UserError(f"{key} has to be set", where=key, fix=f"{key}=FILE.jsonl")
    file, data = path, config.data

    def read() -> Dataset:
        how = {"follow_links": data.follow_links}
        dataset = read_records(file, max_corrupt_fraction=data.max_corrupt_fraction, **how)
        return drop_unusable(dataset, data.max_prompt_tokens, encoder)

    dataset = _drop_what_any_rank_dropped(together(read))
    if rank() == 0:
        for dropped in dataset.dropped:
            logger.warning("dropped %s", dropped)
        logger.info("%s: %d records, %d dropped", path, len(dataset.records), len(dataset.dropped))
    if not dataset.records:
        raise UserError(f"no record is left of {path}", where=key, fix="see the reasons above")
    return dataset.records


def drop_unusable(dataset: Dataset, max_prompt_tokens: int, encoder: PromptEncoder) -> Dataset:
    """Without the records that could not be asked or graded."""
    kept, dropped = [], list(dataset.dropped)
    for record in dataset.records:
        problem = problem_of(record, max_prompt_tokens, encoder)
        if problem is None:
            kept.append(record)
        else:
            dropped.append(DroppedRecord(record.source, record.id, problem))
    return replace(dataset, records=tuple(kept), dropped=tuple(dropped))


def _drop_what_any_rank_dropped(dataset: Dataset) -> Dataset:
    """Ranks read the images by themselves; one that could not read one of them would draw other questions."""
    dropped: dict[str, DroppedRecord] = {}
    for of_rank in gather_objects(dataset.dropped):
        for record in of_rank:
            dropped.setdefault(record.where, record)
    kept = tuple(record for record in dataset.records if record.source not in dropped)
    return replace(dataset, records=kept, dropped=tuple(dropped.values()))


def problem_of(record: Record, max_prompt_tokens: int, encoder: PromptEncoder) -> str | None:
    """Why a record could not be asked or graded; None where it can.

    Its answer cannot be read as its answer type, an image cannot be read, or its prompt in the original order has more
    than ``max_prompt_tokens`` tokens or holds a special token.
    """
    try:
        check_answer(record)
        num_tokens = len(encoder.encode(apply_order(record, range(len(record.images)), 0)).token_ids)
    except UserError as error:
        return error.what
    if num_tokens > max_prompt_tokens:
        return f"its prompt has {num_tokens} tokens, more than data.max_prompt_tokens = {max_prompt_tokens}"
    return None


def most_images(records: Sequence[Record], permutation: PermutationConfig) -> int:
    """The most images that a question has; 0 without records. Records that lie in files are not read for it."""
    if isinstance(records, RecordFiles):
        return most_images_asked(records.max_images, permutation)
    return most_images_asked(max((len(record.images) for record in records), default=0), permutation)


def _decoded_ahead(config: Config, encoder: PromptEncoder, demonstrations: bool) -> LookAhead | None:
    """Lets other processes decode the images of a step before it begins; without work for them none is started.

    Records that were checked at load need that too, where their pixels are more than `data.pixel_cache_mib`.
    """
    if config.data.decode_processes == 0:
        return None
    encoder.decode_ahead(
        num_processes=config.data.decode_processes,
        max_bytes=config.data.decode_ahead_mib * 2**20,
        turn=turn_on_node(),
    )
    of_step = math.ceil(config.rollout.questions_per_step * config.filter.oversample)
    return LookAhead(encoder.expect, config.supervised.batch_size if demonstrations else of_step)


def _checked_at_load(config: Config, paths: Sequence[Path]) -> bool:
    if config.data.check == "auto":
        return sum(path.stat().st_size for path in paths) <= AUTO_LOAD_BYTES
    return config.data.check == "load"


def _open(config: Config, paths: Sequence[Path]) -> RecordFiles:
    """The files' records by their indexes, which one rank makes where they are missing and the others find there."""

    def open_files() -> RecordFiles:
        return open_record_files(
            paths,
            check=check_answer,
            num_processes=min(MAX_INDEX_PROCESSES, len(os.sched_getaffinity(0))),
            max_corrupt_fraction=config.data.max_corrupt_fraction,
        )

    on_rank_zero(lambda: _name_dropped(open_files()), what="the index of the records")
    return open_files()


def _name_dropped(files: RecordFiles) -> None:
    for dropped in files.dropped:
        logger.warning("dropped %s", dropped)
    logger.info("%d records, %d dropped; images are checked as they are drawn", len(files), len(files.dropped))


def _sizes(paths: Sequence[Path], sizes: Sequence[int]) -> Sequence[int]:
    for path, size in zip(paths, sizes, strict=True):
        if size == 0:  # records there are: without demonstrations, or all dropped for ids of the files before
            what, fix = (
                f"no record of {path} can be used",
                "add the field 'demonstration' to the records (sft), or new ids",
            )
            raise UserError(what, where="data.train", fix=fix)
    return sizes


def _refuse_repeats(records: Sequence[Record]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.id in seen:
            fix = "give each record an id of its own"
            raise UserError(f"the id {record.id} is used before, by {seen[record.id]}", where=record.source, fix=fix)
        seen[record.id] = record.source
