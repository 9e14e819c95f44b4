"""What triage found: sentences and tables for people, strict JSON for programs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from perl_megatron.triage.verdicts import ADVICE, Cause, Finding, Tested, Verdict

WIDTH = 120
SHOWN = 8
"""Hypotheses in the table; JSON has all."""


@dataclass(frozen=True)
class Report:
    """On one dump."""

    source: str
    """Which rollouts, in words."""
    num_rollouts: int
    direct: tuple[float, float] | None
    """Largest and mean |engine − trainer| of a token."""
    findings: tuple[Finding, ...]
    """About the records themselves."""
    verdicts: tuple[Verdict, ...]
    not_judged: tuple[str, ...]
    """Parties without a verdict, and why."""

    @property
    def agrees(self) -> bool:
        """Nothing is wrong with the records, and every party that was judged agrees with the reference."""
        return bool(self.verdicts) and not self.findings and not any(verdict.causes for verdict in self.verdicts)

    def as_json(self) -> str:
        """Strict JSON with every hypothesis; numbers that are not finite become text."""
        content = {
            "agrees": self.agrees,
            "source": self.source,
            "num_rollouts": self.num_rollouts,
            "engine_against_trainer": None if self.direct is None else [_number(value) for value in self.direct],
            "findings": [{"cause": finding.cause.value, "text": finding.text} for finding in self.findings],
            "not_judged": list(self.not_judged),
            "parties": {verdict.party: _verdict(verdict) for verdict in self.verdicts},
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def render(self) -> str:
        """At most 120 columns wide."""
        output = io.StringIO()
        console = Console(file=output, width=WIDTH)

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False)

        say(f"{self.num_rollouts} rollouts of {self.source}, against transformers.")
        if self.direct is not None:
            largest, mean = self.direct
            say(f"engine against trainer: the gap of log-probabilities is {_gaps(largest, mean)}.")
        for finding in self.findings:
            say(f"record: {finding.cause.value}. {finding.text}")
        for text in self.not_judged:
            say(f"not judged: {text}")
        for verdict in self.verdicts:
            for line in _sentences(verdict):
                say(line)
            if verdict.causes:
                console.print(_table(verdict), highlight=False, markup=False)
        return output.getvalue().rstrip("\n")


def _sentences(verdict: Verdict) -> Sequence[str]:
    plain, (largest, mean) = verdict.plain, verdict.tolerances
    allowed = f"rounding in {verdict.precision} allows {largest:.1e} and {mean:.1e}"
    gaps = f"the gap is {_gaps(plain.largest, plain.mean)} ({allowed})"
    head = f"{verdict.party}, which should have {verdict.policy}:"
    if not verdict.causes:
        return [f"{head} no mismatch in {verdict.num_rollouts} rollouts; {gaps}."]
    names = " or ".join(cause.value for cause in verdict.causes)
    lines = [
        f"{head} MISMATCH, cause: {names}.",
        f"  {verdict.num_mismatched} of {verdict.num_rollouts} rollouts do not agree; {gaps}.",
        f"  {_explanation(verdict)}",
    ]
    lines += [f"  next ({cause.value}): {ADVICE[cause]}." for cause in verdict.causes]
    return [*lines, f"  where: {verdict.where}."]


def _gaps(largest: float, mean: float) -> str:
    return f"{largest:.1e} at most and {mean:.1e} on average"


def _explanation(verdict: Verdict) -> str:
    if verdict.causes == (Cause.UNEXPLAINED,):
        return "No hypothesis reproduces the numbers."
    best = verdict.winners[0]
    if verdict.causes == (Cause.KERNELS,):
        return (
            f"No hypothesis about the input or the weights reproduces the numbers, but {best.name} is as large: "
            f"{_gaps(best.largest, best.mean)}."
        )
    others = "".join(f"; or: {other.name}" for other in verdict.winners[1:])
    return (
        f"{best.explained} of {verdict.num_mismatched} are reproduced by: {best.name} (then "
        f"{_gaps(best.largest, best.mean)}){others}."
        + (" These cannot be told apart." if others else "")
        + (" The other rollouts are not explained by it." if best.explained < verdict.num_mismatched else "")
    )


def _table(verdict: Verdict) -> Table:
    title = f"{verdict.party}: {len(verdict.tested) - 1} hypotheses were tested, the best first"
    table = Table(title=title, title_justify="left")
    table.add_column("cause")
    table.add_column("hypothesis")
    # Contradicted: rollouts that agree as they are, and would not under the hypothesis.
    for name in ("largest gap", "mean gap", "rollouts", "explained", "contradicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in verdict.tested[: SHOWN + 1]:
        numbers = (f"{each.largest:.1e}", f"{each.mean:.1e}", str(each.num_rollouts))
        counts = (str(each.explained), str(each.broken)) if each.cause else ("", "")
        table.add_row(each.cause.value if each.cause else "", each.name, *numbers, *counts)
    return table


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "causes": [cause.value for cause in verdict.causes],
        "policy": verdict.policy,
        "precision": verdict.precision,
        "num_rollouts": verdict.num_rollouts,
        "num_mismatched": verdict.num_mismatched,
        "tolerance_largest": _number(verdict.tolerances[0]),
        "tolerance_mean": _number(verdict.tolerances[1]),
        "where": verdict.where,
        "winners": [each.name for each in verdict.winners],
        "tested": [_tested(each) for each in verdict.tested],
    }


def _tested(tested: Tested) -> dict[str, Any]:
    return {
        "cause": tested.cause.value if tested.cause else None,
        "hypothesis": tested.name,
        "largest": _number(tested.largest),
        "mean": _number(tested.mean),
        "num_rollouts": tested.num_rollouts,
        "explained": tested.explained,
        "broken": tested.broken,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
