"""`perl-megatron triage`: from recorded rollouts to a verdict on engine and trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.triage.cases import Case, make_cases
from perl_megatron.triage.dump import Dump, RecordedRollout, newest_usable, open_dump, read_rollouts, spread
from perl_megatron.triage.hypotheses import hypotheses
from perl_megatron.triage.judge import judge
from perl_megatron.triage.policies import Policies, check_given
from perl_megatron.triage.reference import Distribution, Precision
from perl_megatron.triage.report import Report
from perl_megatron.triage.scoring import Party, References, Scoring
from perl_megatron.triage.verdicts import Verdict


def run(path: Path, *, policy: Path | None, other_policies: Sequence[Path], limit: int, json_file: Path | None) -> bool:
    """Print the verdicts and write the file; whether engine and trainer both agree with the reference.

    Raises UserError for what cannot be read, and where the weights that the rollouts were sampled with are not there.
    """
    report = triage(path, policy=policy, other_policies=other_policies, limit=limit)
    if json_file is not None:
        json_file.write_text(report.as_json(), encoding="utf-8")
    print(report.render())
    return report.agrees


def triage(path: Path, *, policy: Path | None, other_policies: Sequence[Path], limit: int) -> Report:
    """The report on the rollouts of ``path``; see ``run``."""
    dump = open_dump(path)
    config = dump.config
    policies = Policies(dump, given=policy, others=other_policies)
    rollouts = choose(dump, policies, policy, limit)
    encoder = PromptEncoder(
        config.model.path,
        system_prompt=config.data.system_prompt,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )
    dtype = getattr(torch, config.model.dtype)
    distribution = Distribution(config.rollout.temperature, config.rollout.top_p, encoder.banned_token_ids)
    references = References(config.model.path, weights_dtype=dtype, distribution=distribution)
    working: Precision = config.model.dtype
    cases, findings = make_cases(rollouts, encoder, dump.images, references[working].positions)
    scoring = Scoring(cases, references)
    max_images = max(len(rollout.image_keys) for rollout in rollouts)
    verdicts: list[Verdict] = []
    not_judged: list[str] = []
    for party in _parties(cases, policies, config):
        if isinstance(party, str):
            not_judged.append(party)
            continue
        others = policies.candidates(party.policy)
        possible = hypotheses(encoder, max_images, expected=party.policy, others=others, dtype=dtype)
        verdicts.append(judge(scoring, party, possible))
    if not verdicts and not findings:
        raise UserError(
            f"there is nothing to judge: {'; '.join(not_judged)}", where=str(path), fix="give rollouts of another step"
        )
    return Report(
        source=f"step {rollouts[0].step}, weights of version {rollouts[0].weight_version} ({dump.run.root})",
        num_rollouts=len(rollouts),
        direct=direct_gap(cases),
        findings=tuple(findings),
        verdicts=tuple(verdicts),
        not_judged=tuple(not_judged),
    )


def choose(dump: Dump, policies: Policies, given: Path | None, limit: int) -> list[RecordedRollout]:
    """The rollouts to look at: of the newest step whose weights are at hand, and there of one version.

    Raises UserError where there are none.
    """
    if given is not None:
        check_given((rollout.weight_version for file in dump.files for rollout in read_rollouts(file)), given)
    usable = newest_usable(dump, lambda rollout: policies.has(rollout.weight_version))
    if not usable:
        raise UserError(
            "the weights that sampled these rollouts are no longer there, or changed in the middle of each response; "
            f"of this run there are versions {', '.join(map(str, policies.versions))}",
            where=f"{dump.files[0]} to {dump.files[-1].name}" if len(dump.files) > 1 else str(dump.files[0]),
            fix="give them with --policy FOLDER, or another step; run.save_every and run.keep_checkpoints keep more",
        )
    version = max(version_of(rollout) for rollout in usable)
    if dump.config.algorithm.loss_view == "original":
        # The trainer's were taken after the original's prompt: of another view they are no match for the engine's.
        usable = [replace(rollout, logprob_old=None) if rollout.permuted else rollout for rollout in usable]
    return spread([rollout for rollout in usable if rollout.weight_version == version], limit)


def version_of(rollout: RecordedRollout) -> int:
    """The one version of a usable rollout."""
    assert rollout.weight_version is not None, "rollouts of several versions are not usable"
    return rollout.weight_version


def direct_gap(cases: Sequence[Case]) -> tuple[float, float] | None:
    """Largest and mean |engine − trainer| of a token; None where no rollout has both."""
    pairs = [(case.rollout.logprob_rollout, case.rollout.logprob_old) for case in cases]
    gaps = [np.abs(engine - trainer) for engine, trainer in pairs if engine is not None and trainer is not None]
    if not gaps:
        return None
    joined = np.nan_to_num(np.concatenate(gaps), nan=np.inf)
    return float(joined.max()), float(joined.mean())


def _parties(cases: Sequence[Case], policies: Policies, config: Config) -> list[Party | str]:
    """Engine and trainer; in words, why one cannot be judged."""
    if not cases:
        return ["engine and trainer: the images of all rollouts were changed"]
    rollout = cases[0].rollout
    engine = policies.expected(version_of(rollout))
    everything = tuple(range(len(cases)))
    parties: list[Party | str] = [Party("engine", engine, config.model.dtype, everything)]
    members = tuple(index for index in everything if cases[index].rollout.logprob_old is not None)
    # The trainer's are of the weights before the step's first update, whichever the engine had.
    version = rollout.step - 1
    trainer = engine if version == rollout.weight_version else policies.of_run(version)
    if not members:
        return [
            *parties,
            "trainer: no log-probabilities of it were recorded (dropped groups; old_policy=engine; loss_view)",
        ]
    if trainer is None:
        return [*parties, f"trainer: its weights, version {version}, are no longer there"]
    precision: Precision = "float8" if config.model.fp8 != "none" else config.model.dtype
    return [*parties, Party("trainer", trainer, precision, members)]
