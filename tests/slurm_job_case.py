"""A Slurm job of three machines around the test, and a stand-in for the `scontrol` that knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_megatron.launch import job_step

REFUSAL = "echo 'Unable to contact slurm controller' >&2; exit 1\n"


class JobAround:
    """The job, whose controller can be away."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._away = folder / "away"
        scontrol = folder / "scontrol"
        scontrol.write_text(
            "#!/bin/sh\n"
            f"if [ -s '{self._away}' ]; then sed -i 1d '{self._away}'; {REFUSAL}fi\n"
            'case "$*" in\n'
            '"show hostnames gpu[07-09]") echo gpu07; echo gpu08; echo gpu09;;\n'
            '"--oneliner show node gpu07") echo "NodeName=gpu07 NodeAddr=10.0.0.7 NodeHostName=gpu07";;\n'
            "*) echo unknown >&2; exit 1;; esac\n"
        )
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
        for name, value in (("JOB_ID", "120042"), ("JOB_NUM_NODES", "3"), ("JOB_NODELIST", "gpu[07-09]")):
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setattr(job_step, "ASK_AGAIN_SECONDS", 0.01)
        monkeypatch.setattr(job_step, "ANSWER_SECONDS", 0.2)

    def is_away(self, questions: int) -> None:
        """Slurm does not answer the next so many."""
        self._away.write_text("once\n" * questions)
