"""The folder of a run: what lies where, and who may create it when.

It is made only after every check has passed, by rank 0, so a run that was refused leaves nothing behind.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from perl_megatron.config.load import LoadedConfig, config_fields, load_config, save_resolved
from perl_megatron.config.schema import Config
from perl_megatron.durable import sync_path
from perl_megatron.errors import UserError
from perl_megatron.observability.json_lines import write_text

MAY_CHANGE = frozenset(
    (
        *("run.steps", "run.save_every", "run.keep_checkpoints", "run.record_rollouts"),
        *("run.keep_best", "run.best_is", "run.asynchronous_checkpoints", "deadlines"),
        *("run.name", "run.directory", "parallel", "evaluation", "data.evaluation", "data.epochs", "rollout.engine"),
        *("endpoint", "judge.url", "judge.api_key_file", "judge.deadline", "judge.retries", "judge.concurrency"),
        *("judge.cache", "reward.judge_failure", "data.weights", "data.decode_processes", "data.decode_ahead_mib"),
        *("data.pixel_cache_mib", "data.follow_links"),
        *("rollout.tensor_parallel", "rollout.max_concurrent_sequences", "rollout.gpu_memory_fraction"),
        *("rollout.servers", "rollout.api_key_file", "rollout.weight_transfer", "rollout.shared_folder"),
        *("rollout.request_deadline", "rollout.health_deadline", "rollout.sync_deadline"),
        *("rollout.cpu_cache_gib", "rollout.questions_per_call", "launch", "actor"),
        *("filter.max_refills", "filter.skip_empty_steps", "supervised.steps"),
        *("optimizer.learning_rate", "optimizer.min_learning_rate", "model.recompute"),
        "optimizer.max_skipped_updates",
    )
)
"""Sections and keys that a resumed run may set otherwise than it began."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder of this config's run; nothing is created."""
        return cls(config.run.directory / config.run.name)

    @classmethod
    def create(cls, loaded: LoadedConfig, *, resume: bool) -> RunFolder:
        """Make the folder (or take the existing one, with `resume`) and write the resolved config into it.

        A new folder appears whole: a run that is killed at its very beginning can be started again or resumed. Only
        rank 0 calls this, after all checks. Raises UserError as `check_available` does.
        """
        folder = cls.of(loaded.config)
        folder.check_available(resume=resume)
        fresh = folder if resume else cls(folder.root.with_name(f".{folder.root.name}.new"))
        if not resume:
            shutil.rmtree(fresh.root, ignore_errors=True)
        for path in (fresh.root, fresh.tensorboard, fresh.checkpoints, fresh.rollouts, fresh.evaluations):
            path.mkdir(parents=True, exist_ok=True)
        save_resolved(loaded, fresh.config)
        if not fresh.identity.exists():
            write_text(fresh.identity, secrets.token_hex(8) + "\n")
        if not resume:
            fresh.root.rename(folder.root)
            sync_path(folder.root.parent)
        return folder

    def read_identity(self) -> str | None:
        """What tells this run from others, whatever its folder is called; None for a run from before there was one."""
        return self.identity.read_text(encoding="utf-8").strip() if self.identity.exists() else None

    def check_available(self, *, resume: bool) -> None:
        """UserError where a new run would overwrite an old one, or where there is no run to resume."""
        if resume and not self.config.is_file():
            raise UserError(
                f"there is no run to resume in {self.root}",
                where="run.directory, run.name, --resume",
                fix="leave --resume out to start a new run",
            )
        if not resume and self.root.exists():
            raise UserError(
                f"the run folder {self.root} exists",
                where="run.directory, run.name",
                fix="continue it with --resume, choose another run.name, or remove the folder",
            )

    def check_same_run(self, config: Config) -> None:
        """UserError where a resumed run would go on with other settings than it began with.

        What may change: where and how it runs, how long, how often it evaluates and saves, and the learning rate.
        """
        began = load_config(self.config).config
        changed = []
        for key in config_fields():
            section, name = key.split(".")
            before, after = getattr(getattr(began, section), name), getattr(getattr(config, section), name)
            if before != after and not {section, key} & MAY_CHANGE:
                changed.append(f"{key}: {before!r} -> {after!r}")
        if changed:
            raise UserError(
                "the run to resume began with other settings:\n  " + "\n  ".join(changed),
                where=str(self.config),
                fix=f"resume with them (`--resume {self.config}` has them all), or start a new run",
            )

    @property
    def config(self) -> Path:
        """The resolved config with the origin of every value."""
        return self.root / "config.yaml"

    @property
    def identity(self) -> Path:
        """A random number of the run's own: its checkpoints name it."""
        return self.root / "identity"

    @property
    def lock(self) -> Path:
        """Held by the job that trains the run."""
        return self.root / "lock"

    @property
    def logs(self) -> Path:
        """Logs of every rank, a folder for each launch."""
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        """JSON lines: one row for each step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Training states."""
        return self.root / "checkpoints"

    @property
    def step_in_progress(self) -> Path:
        """The groups of a step that the run had to end before; a resumed run goes on with them."""
        return self.root / "step_in_progress.json"

    @property
    def rollouts(self) -> Path:
        """Recorded rollouts, a file for each step, and the images they saw."""
        return self.root / "rollouts"

    @property
    def skipped(self) -> Path:
        """The batches of skipped updates, for `perl-megatron replay`."""
        return self.root / "skipped"

    @property
    def groups(self) -> Path:
        """The ledger: JSON lines, what became of every group that was drawn, and why."""
        return self.root / "groups.jsonl"

    @property
    def evaluations(self) -> Path:
        """Raw outputs of every evaluation."""
        return self.root / "evaluations"

    def evaluation_outputs(self, step: int) -> Path:
        """Raw outputs of the evaluation after `step` steps."""
        return self.evaluations / f"step-{step:06d}.jsonl"

    @property
    def export(self) -> Path:
        """The final policy as a Hugging Face folder."""
        return self.root / "export"

    @property
    def exported_step(self) -> Path:
        """The step whose policy `export` is; written after it."""
        return self.root / "export.step"

    @property
    def summary(self) -> Path:
        """The run in a few numbers (JSON)."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """Self-contained HTML report."""
        return self.root / "report.html"

    @property
    def curves(self) -> Path:
        """Plot of reward, accuracy and flip rate (PNG)."""
        return self.root / "curves.png"
