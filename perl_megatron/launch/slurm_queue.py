"""Submit a Slurm job, beside those of the same run that Slurm has already."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from perl_megatron.errors import UserError
from perl_megatron.launch.slurm import JobFiles

NO_ANSWER_FIX = "submit from a login node of the cluster, or look at the script with --dry-run"
_AFTER_THE_END = re.compile(r"(after(any|ok|notok):)?\d+(:\d+)*")
"""A dependency on the end of jobs, `afterany` without a word; `after` and others do not wait for it (`man sbatch`)."""


def require_slurm() -> None:
    """UserError where jobs cannot be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise UserError("Slurm's `sbatch` is not here", where="PATH", fix=NO_ANSWER_FIX)


def jobs_in_queue(name: str) -> dict[int, str]:
    """Number → state of all jobs of that name that wait, run or end. UserError where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--name={name}", "--format=%A %T"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"Slurm does not answer: {result.stderr.strip()}", where="squeue", fix=NO_ANSWER_FIX)
    return {int(number): state for number, state in map(str.split, result.stdout.splitlines())}


def check_alone(files: JobFiles, name: str, *, command: str, sbatch_options: Sequence[str]) -> bool:
    """Whether a job in the queue is to write the same files as this one, which waits for it (`--dependency`).

    What jobs left that are not in the queue any more is removed: their scripts and configs; logs stay. UserError where
    this job would not wait for the other.
    """
    queue, others = jobs_in_queue(name), dict[int, Path]()
    for script in files.root.glob("job-*.sbatch"):
        digits, text = script.stem.removeprefix("job-"), script.read_text(encoding="utf-8")
        if not digits.isdecimal():  # somebody's own
            continue
        number = int(digits)
        if number not in queue:
            _forget(script, text)
        # A run and its evaluation write different files.
        elif ("\ncommand=eval\n" in text) == (command == "eval"):
            others[number] = script
    for number, script in others.items():
        if not _waits_for(number, script, sbatch_options):
            everyone = ":".join(map(str, sorted(others)))
            raise UserError(
                f"job {number} ({queue[number]}) of the same run is not over, and both would write the same files",
                where=f"run.name = {name}",
                fix=f"wait for it, end it (scancel {number}), choose another run.name, or let this one wait in Slurm: "
                f"launch.sbatch_options=[--dependency=afterany:{everyone}]",
            )
    return bool(others)


def submit(files: JobFiles, script: str) -> int:
    """Submit the script and keep it; the job's number. UserError with Slurm's words where it is refused.

    OSError where the script cannot be written: nothing was submitted then.
    """
    files.draft.write_text(script, encoding="utf-8")
    fix = "change launch.partition, account, qos, time, nodes, gpus_per_node or sbatch_options"
    try:
        number = sbatch(script, where=f"sbatch, for {files.root}", fix=fix)
    except UserError:
        files.config.unlink()
        files.draft.unlink()
        with suppress(OSError):  # where this was the first submission
            files.root.rmdir()
        raise
    kept = files.script(number)
    try:
        files.draft.rename(kept)
    except OSError as error:
        raise UserError(
            f"job {number} is in Slurm's queue, but later submissions would not see it: its script cannot be renamed "
            f"({error.strerror})",
            where=str(files.draft),
            fix=f"end the job (scancel {number}), or rename the script to {kept.name}",
        ) from error
    return number


def sbatch(script: str, *, where: str, fix: str) -> int:
    """Submit any batch script; the job's number. UserError, with this place and remedy, where Slurm refuses it."""
    # It reads the script once, and keeps a copy of its own.
    result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    number = result.stdout.strip().partition(";")[0]
    if result.returncode != 0 or not number.isdecimal():
        said = result.stderr.strip() or result.stdout.strip()
        raise UserError(f"Slurm refused the job: {said}", where=where, fix=fix)
    return int(number)


def write_key(file: Path) -> None:
    """A new key of the rollout servers, for this user's eyes only; one that is there stays."""
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe() + "\n", encoding="ascii")


def _waits_for(number: int, script: Path, sbatch_options: Sequence[str]) -> bool:
    """Whether a job with these options does not begin before that one, of the same name, has ended."""
    given = [option.partition("=")[2] for option in sbatch_options if option.startswith("--dependency=")]
    # `singleton` waits for earlier jobs of the same name, but only for those of the same user.
    is_mine = script.stat().st_uid == os.getuid()

    def includes_it(dependencies: str) -> bool:
        return any(
            (_AFTER_THE_END.fullmatch(dependency) is not None and str(number) in dependency.split(":"))
            or (dependency == "singleton" and is_mine)
            for dependency in dependencies.split(",")
        )

    return bool(given) and all(map(includes_it, given))  # of several, whichever Slurm takes


def _forget(script: Path, text: str) -> None:
    for config in script.parent.glob("config-*.yaml"):
        if config.name in text:
            config.unlink(missing_ok=True)
    script.unlink(missing_ok=True)
