"""The Slurm job array of a sweep: every task is one worker, with as many machines as its runs need."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from perl_megatron.launch.failures import EXIT_STOPPED
from perl_megatron.launch.slurm_queue import require_slurm, sbatch

SECONDS_BEFORE_THE_END = 300
"""When Slurm tells a worker that its time is nearly up, so that its run can write a checkpoint."""


def render_array(
    command: Sequence[str],
    *,
    workers: int,
    nodes: int,
    name: str,
    folder: Path,
    options: Sequence[str],
    setup: Path | None,
) -> str:
    """The batch script. ``command`` is one worker's, an argument each; nothing in it is read by the shell. What Slurm
    reads was checked by ``config/derive_launch.py``.

    Each task has ``nodes`` machines. The worker is on the first; a run of several is a step (``launch/job_step.py``).
    A task whose worker was asked to stop (preemption, time limit) is queued again by Slurm, unless it was cancelled.
    """
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --array=0-{workers - 1}",
        f"#SBATCH --nodes={nodes} --ntasks-per-node=1",
        f"#SBATCH --signal=B:TERM@{SECONDS_BEFORE_THE_END}",
        "#SBATCH --requeue --open-mode=append",
        f"#SBATCH --output={_quoted(folder / 'worker-%a.log')}",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *([] if setup is None else [f". {shlex.quote(str(setup.resolve()))}"]),
        f"{shlex.join(command)} &",
        "worker=$!",
        "trap 'kill -TERM $worker' TERM",
        "wait $worker; status=$?",
        "# A signal ends `wait` at once (status above 128); the worker is still ending its step.",
        'while kill -0 "$worker" 2>/dev/null; do wait $worker; status=$?; done',
        f'if [ "$status" -eq {EXIT_STOPPED} ]; then',
        '    task="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        "    # scancel sends the same signal as a preemption.",
        '    job=$(scontrol --oneliner show job "$task")',
        '    if [ "${job#* JobState=CANCELLED }" = "$job" ]; then scontrol requeue "$task"; fi',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def submit(script: Path) -> int:
    """Give the script to Slurm; the array's number. UserError where there is no sbatch, or it refuses."""
    require_slurm()
    return sbatch(script.read_text(encoding="utf-8"), where=str(script), fix="correct slurm.options")


def _quoted(path: Path) -> str:
    """Slurm's own quoting in #SBATCH lines: double quotes, where the path has blanks."""
    text = str(path.resolve())
    return f'"{text}"' if " " in text else text
