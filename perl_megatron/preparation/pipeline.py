"""The stages one after another: rules → rephrase → difficulty → resample → label → contract.

Each reads the questions of the one before, and is skipped where it is finished with the same settings. A changed
setting puts the files of its stage and of all later ones aside and does them anew. What was interrupted goes on where
it stopped: nothing that is decided is asked again, and replies that were not yet written are in the cache.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perl_megatron.chat.client import ChatClient
from perl_megatron.config.endpoint_section import EndpointConfig
from perl_megatron.data.contract.contract_templates import ContractTemplates
from perl_megatron.data.records import write_records
from perl_megatron.errors import UserError
from perl_megatron.preparation.contract import Contracts
from perl_megatron.preparation.difficulty import EndpointPolicy, Policy, measure
from perl_megatron.preparation.label import Label
from perl_megatron.preparation.language_stage import LanguageStage, ask_all
from perl_megatron.preparation.manifest import Manifest, file_fingerprint, fingerprint, only_one
from perl_megatron.preparation.mantis import source_tables
from perl_megatron.preparation.prompts import Prompt
from perl_megatron.preparation.question import Dropped, Kept, Outcome, Question
from perl_megatron.preparation.rephrase import Rephrase
from perl_megatron.preparation.resample import Resampled, resample
from perl_megatron.preparation.rules import AlreadyDone, apply_rules
from perl_megatron.preparation.settings import PreparationSettings
from perl_megatron.preparation.stage_files import StageCounts, StageFiles, refuse_unanswered

STAGES = ("rules", "rephrase", "difficulty", "resample", "label", "contract")
RECORDS = "records.jsonl"
PERMUTABLE = "permutable"
REPLIES = "replies"
"""Folder of cached replies, where no `cache` is set."""

MakePolicy = Callable[[list[Question]], AbstractContextManager[Policy]]
Watch = Callable[[str, Iterable[Outcome], int | None], Iterable[Outcome]]
"""(stage, outcomes, how many are still to come or None) → the same outcomes, shown to somebody as they come."""


def unwatched(stage: str, outcomes: Iterable[Outcome], total: int | None) -> Iterable[Outcome]:
    """Shows nothing."""
    return outcomes


class Pipeline:
    """All stages over one folder.

    Args:
        make_policy: gives the policy of the stage `difficulty` for some questions. None: the policy behind
            `policy_endpoint`.
        policy_mark: what tells that policy from others, besides the settings.
        watch: sees every outcome.

    Raises:
        UserError: a prompt or a file of templates that cannot be used.
    """

    def __init__(
        self,
        settings: PreparationSettings,
        folder: Path,
        *,
        make_policy: MakePolicy | None = None,
        policy_mark: object = None,
        watch: Watch = unwatched,
    ):
        self.settings, self.folder = settings, folder
        self._make_policy, self._policy_mark, self._watch = make_policy or self._endpoint_policy, policy_mark, watch
        self.files = {name: StageFiles(folder, number, name) for number, name in enumerate(STAGES, start=1)}
        self.rephrase = Rephrase.of(settings.rephrase, settings.output.seed)
        self.label = Label.of(settings.label)
        self.contracts = Contracts.of(settings.output)
        self.counts: dict[str, StageCounts] = {}
        self.resampled: Resampled | None = None
        self.put_aside: Path | None = None
        """Where the files went that other settings had made, if there were any."""

    def run(self, until: str = STAGES[-1]) -> None:
        """All stages up to ``until``. UserError for what a person has to mend; what is finished stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with only_one(self.folder):
            manifest, marks = Manifest(self.folder), self.marks()
            for number, name in enumerate(STAGES[: STAGES.index(until) + 1]):
                if manifest.is_stale(name, marks[name]):
                    later = STAGES[number:]
                    paths = [path for each in later for path in self.files[each].paths]
                    self.put_aside = manifest.put_aside(later, [*paths, self.folder / RECORDS]) or self.put_aside
                self._stage(name, manifest, marks[name])

    def contract_counts(self) -> Counter[str]:
        """How many of the final records are ``PERMUTABLE``, and of the others how many for which reason."""
        kept = {question.id for question in self.files["contract"].questions()}
        given = (row for row in self.files["contract"].raw_outputs() if row["id"] in kept)
        return Counter(PERMUTABLE if row["permutable"] else row["reason"] for row in given)

    def _stage(self, name: str, manifest: Manifest, mark: str) -> None:
        files, is_finished = self.files[name], manifest.is_finished(name, mark)
        if not is_finished:
            manifest.note(name, mark, finished=False)
            files.mend()
        done, self.counts[name] = files.decided()
        if name == "resample":
            self._resample(write=not is_finished)
        if not is_finished:
            if name != "resample":
                self._decide(name, done, self.counts[name])
            if name == "contract":
                self._write_records()
            manifest.note(name, mark, finished=True)
        self._write_counts()

    def _decide(self, name: str, done: set[str], counts: StageCounts) -> None:
        """Let a stage decide on each question that it has not decided on."""
        files = self.files[name]
        if name == "rules":
            judged = apply_rules(self.settings.source, self.settings.rules, self.folder, done)
            new = (outcome for outcome in judged if not isinstance(outcome, AlreadyDone))
            files.write(self._watch(name, new, None), counts)
            files.finish()
            return
        before = self.files[STAGES[STAGES.index(name) - 1]]
        order = [question.id for question in before.questions()]
        pending = [question for question in before.questions() if question.id not in done]
        if pending:
            with self._outcomes(name, pending) as outcomes:
                files.write(self._watch(name, outcomes, len(pending)), counts)
        self._write_counts()
        refuse_unanswered(name, counts)
        files.finish(order)

    @contextmanager
    def _outcomes(self, name: str, pending: list[Question]) -> Iterator[Iterable[Outcome]]:
        if name == "difficulty":
            with self._make_policy(pending) as policy:
                yield measure(pending, policy, self.folder)
        elif name == "contract":
            yield (self.contracts.outcome(question, self.folder) for question in pending)
        else:
            yield from self._language_outcomes(self.rephrase if name == "rephrase" else self.label, pending)

    def _language_outcomes(self, stage: LanguageStage, pending: list[Question]) -> Iterator[Iterable[Outcome]]:
        if not any(map(stage.asks, pending)):  # then nobody has to be there
            yield [Kept(question) for question in pending]
            return
        with self._client(self.settings.endpoint, "endpoint", stage.name) as client:
            yield ask_all(stage, pending, client, self.folder, seed=self.settings.output.seed)

    def _client(self, endpoint: EndpointConfig, section: str, stage: str) -> ChatClient:
        if not endpoint.url:
            raise UserError(
                f"the stage '{stage}' has nobody to ask", where=f"{section}.url", fix=f"set {section}.url=http://…/v1"
            )
        cache = endpoint.cache or self.folder / REPLIES
        return ChatClient(endpoint.model_copy(update={"cache": cache}))

    @contextmanager
    def _endpoint_policy(self, questions: list[Question]) -> Iterator[Policy]:
        with self._client(self.settings.policy_endpoint, "policy_endpoint", "difficulty") as client:
            yield EndpointPolicy(client, self.settings.difficulty, self.folder, seed=self.settings.output.seed)

    def _resample(self, *, write: bool) -> None:
        """Choose by accuracy. The whole choice is made at once, also to say what it was where it is made already."""
        settings, files = self.settings.resample, self.files["resample"]
        questions = list(self.files["difficulty"].questions())
        result = self.resampled = resample(
            [question.accuracy or 0.0 for question in questions],
            settings.histogram,
            size=settings.size,
            allow_repeats=settings.allow_repeats,
            seed=self.settings.output.seed,
        )
        num_repeats = len(result.chosen) - len(set(result.chosen))
        self.counts["resample"].num_repeats = num_repeats
        if not write:
            return
        for path in files.paths:
            path.unlink(missing_ok=True)
        counts = self.counts["resample"] = StageCounts(num_repeats=num_repeats)
        outcomes: list[Outcome] = []
        uses = dict.fromkeys(range(len(questions)), 0)
        for index in result.chosen:
            uses[index] += 1
        for index, question in enumerate(questions):
            if uses[index] == 0:
                reason = "there are enough questions of its accuracy"
                outcomes.append(Dropped(question.id, question.source, reason, f"{question.accuracy:g}"))
            for use in range(1, uses[index] + 1):
                again = question if use == 1 else replace(question, id=f"{question.id}~{use}")
                outcomes.append(Kept(again))
        files.write(self._watch("resample", outcomes, len(outcomes)), counts)
        files.finish()

    def _write_records(self) -> None:
        questions = self.files["contract"].questions()
        write_records(self.folder / RECORDS, (self.contracts.record(each, self.folder) for each in questions))

    def _write_counts(self) -> None:
        """`counts.json`: what went into and came out of each stage."""
        content: dict[str, Any] = {"stages": {name: counts.values() for name, counts in self.counts.items()}}
        if self.resampled is not None:
            content["resample"] = {key: value for key, value in asdict(self.resampled).items() if key != "chosen"}
        if "contract" in self.counts:
            content["contracts"] = dict(self.contract_counts().most_common())
        temporary = self.folder / ".counts.json.tmp"
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, self.folder / "counts.json")

    def marks(self) -> dict[str, str]:
        """For each stage, what it depends on: its settings, and the mark of the stage before."""
        settings = self.settings
        base = settings.source.path
        links = ["follow_links"] if settings.source.follow_links else []
        tables = [[os.path.relpath(each, base), file_fingerprint(each)] for each in source_tables(settings.source)]
        values: dict[str, Any] = {
            "rules": [settings.source.turns, str(settings.source.images), settings.rules, tables, *links],
            "rephrase": [settings.rephrase, self.rephrase.prompt, settings.endpoint.model, settings.output.seed],
            "difficulty": [settings.difficulty, settings.policy_endpoint.model, self._policy_mark],
            "resample": [settings.resample, settings.output.seed],
            "label": [settings.label, self.label.prompt, settings.endpoint.model],
            "contract": [settings.output, self.contracts.templates],
        }
        marks: dict[str, str] = {}
        before = ""
        for name in STAGES:
            before = marks[name] = fingerprint(before, [_plain(value) for value in values[name]])
        return marks


def _plain(value: Any) -> Any:
    """A value as JSON; what does not decide a stage's result (how many questions go together) is left out."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude={"questions_at_once", "policy", "prompt", "templates"})
    if isinstance(value, ContractTemplates):
        return {name: [each.model_dump(mode="json") for each in family] for name, family in value.families.items()}
    return asdict(value) if isinstance(value, Prompt) else value
