"""What the tests of verdicts do with a run: break one party's numbers, look, and read the verdict."""

from __future__ import annotations

from recorded_run import RecordedRun

from perl_megatron.triage.command import triage
from perl_megatron.triage.report import Report
from perl_megatron.triage.verdicts import Verdict

ENGINE, TRAINER = "logprob_rollout", "logprob_old"


def look(run: RecordedRun, *, policy=None, others=(), limit=16) -> Report:
    return triage(run.root, policy=policy, other_policies=others, limit=limit)


def verdict(report: Report, party: str) -> Verdict:
    return next(each for each in report.verdicts if each.party == party)


def causes(report: Report) -> dict[str, list[str]]:
    return {each.party: [cause.value for cause in each.causes] for each in report.verdicts}


def broken(run: RecordedRun, folder, party: str, log_probs) -> RecordedRun:
    """A copy of the run with one party's numbers from ``log_probs(row)``."""
    return run.copy(folder / "broken").rewrite(lambda row: {party: log_probs(row)})
