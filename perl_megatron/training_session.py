"""A run of permuted GRPO in progress: a session with an engine and held-out questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from perl_megatron.ahead import AheadCollector
from perl_megatron.collect import GroupCollector, NothingKeptError
from perl_megatron.drawn import Drawn, ledger_rows
from perl_megatron.errors import UserError
from perl_megatron.evaluation.evaluate import evaluate
from perl_megatron.rollout.engine import RolloutEngine
from perl_megatron.runtime.collective import any_rank, gather_objects, together
from perl_megatron.runtime.grace import Grace
from perl_megatron.session import Session
from perl_megatron.step_in_progress import read_step, write_step
from perl_megatron.step_metrics import mismatch_metrics, staleness_metrics
from perl_megatron.types import Record


class TrainingSession(Session):
    """Permuted GRPO: a session with an engine and held-out questions."""

    def __init__(
        self,
        *args: Any,
        engine: RolloutEngine,
        collector: GroupCollector | AheadCollector,
        evaluation_records: Sequence[Record],
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.engine, self.collector, self.evaluation_records = engine, collector, evaluation_records
        collector.watch(self.phases)
        self._sync_metrics: dict[str, float] = {}
        self._synced_step = -1
        self._is_exhausted = False
        self._grace = Grace(self._stop, self.config.launch.grace_seconds)
        self._is_warned = False
        collector.stop_by(lambda: any_rank(self._grace.is_over_before_step(self._elapsed())))

    def _elapsed(self) -> float:
        """Seconds of the step that is under way. The last one's checkpoint came after its times were taken."""
        return self.phases.elapsed - self.phases.spent("save")

    def await_rollouts(self, step: int) -> None:
        """Wait for the rollouts that were begun during the last update; the policy has made ``step`` steps.

        UserError, on all ranks, where they failed.
        """
        self.collector.await_rollouts(lambda: self.sync_weights(step))

    def sync_weights(self, step: int) -> None:
        """Bring π_θ after ``step`` steps into the engine, which then is awake and samples as π_old."""
        if self._synced_step == step:
            self.engine.wake()
            return
        if self._engine_sleeps:  # where it has just been started: its cache must not be there beside the buckets
            self.engine.sleep()
        report = self.engine.update_weights(self.actor.weights(), version=step)
        self._synced_step = step
        self._sync_metrics = {
            "sync/seconds": report.seconds,
            "sync/bytes": float(report.num_bytes),
            "sync/tensors": float(report.num_tensors),
            "sync/attest_seconds": report.attest_seconds,
        }

    def rest_engine(self, step: int) -> None:
        """Let a colocated engine give its device memory to the trainer; ``sync_weights`` wakes it."""
        if self._engine_sleeps:
            with self.phases("sync", step=step):
                self.engine.sleep()

    @property
    def _engine_sleeps(self) -> bool:
        """Whether the engine has memory of the trainer's devices to give."""
        return self.engine.name != "server" and self.config.rollout.sleep_mode

    def log_step(self, step: int, drawn: Drawn, updates: Sequence[dict[str, float]], metrics: dict[str, float]) -> None:
        """Log one step and record its rollouts. Of several updates, numbers are averaged, counts are added up."""
        self.journal.groups(step, ledger_rows(drawn))
        self.journal.rollouts(step, drawn.kept, drawn.dropped)
        times, saved = self.phases.take(), self.save_times()
        self._learn({**times, **saved})
        idle = self.data_idle.follow(self.collector.take_waits(), times["seconds/step"])
        sampled = sum(len(rollout.token_ids) for group in drawn.groups for rollout in group.rollouts)
        self.journal.step(
            step,
            {
                **merge_updates(updates),
                **metrics,
                **mismatch_metrics(drawn.kept, self.config.algorithm),
                **staleness_metrics(drawn.kept, step),
                **drawn.cache_use.metrics(),
                **self._sync_metrics,
                **idle,
                **saved,
                **times,
                "throughput/tokens_per_second": sampled / times["seconds/step"],
            },
        )

    def end_of_questions(self, drawn: Drawn) -> None:
        """All `data.epochs` are used up, and this step kept nothing: the run is complete."""
        self._is_exhausted = True
        self._record_refused(drawn)
        self.journal.note(f"the questions of data.epochs = {self.config.data.epochs} are used up: {drawn.step} steps")

    def note_failure(self, error: UserError) -> None:
        """As every session; the groups of a step that kept none are in the ledger too."""
        if isinstance(error, NothingKeptError):
            self._record_refused(error.drawn)

    def _record_refused(self, drawn: Drawn) -> None:
        """What a step drew that kept nothing."""
        self.journal.groups(drawn.step + 1, ledger_rows(drawn))
        self.journal.rollouts(drawn.step + 1, [], drawn.dropped)

    def save_and_evaluate_if_due(self, step: int) -> None:
        """Checkpoint and evaluate as often as the config says. In this order a killed evaluation costs no step."""
        self.save_if_due(step)
        if self.owes_evaluation(step) and not any_rank(self._grace.is_over_before("evaluate")):
            self.evaluate(step)

    def owes_evaluation(self, step: int) -> bool:
        """Whether the policy is to be evaluated after ``step`` steps: at the start, and as often as the config says."""
        every = self.config.evaluation.every
        return step == 0 or (every > 0 and step % every == 0)

    def evaluate(self, step: int) -> None:
        """Held-out accuracy and flip rate of π_θ, unless measured at this step already."""
        if not self.evaluation_records:
            return
        self._agree("whether to evaluate", {"step": step})
        if any_rank(self.journal.has(step, "evaluation/accuracy")):
            return
        with self.saved_on_user_error(step), self.phases("evaluate", step=step):
            self.await_rollouts(step)
            self.sync_weights(step)
            evaluation = evaluate(self.config, self.evaluation_records, self.encoder, self.engine)
            self.engine.take_cache_use()  # belongs to no step
            self.collector.take_waits()
        self.journal.evaluation(step, evaluation.metrics(), evaluation.write)
        self.score_if_saved(step)
        self._grace.learn({"seconds/evaluate": self.phases.leave_out("evaluate")})

    def finish(self, step: int) -> None:
        """As every session; a complete run evaluates its policy first."""
        if self.is_complete(step):
            self.save(step)  # before the evaluation, which may be killed
            self.evaluate(step)
            self.rest_engine(step)  # the export has buckets as an update of the weights has
        super().finish(step)
        self._keep_step_in_progress()

    def close(self) -> None:
        """As every session; ends the engine too."""
        with ExitStack() as parts:
            parts.callback(self.engine.close)
            parts.callback(self.collector.close)
            parts.callback(super().close)

    def is_complete(self, step: int) -> bool:
        """As every session; also where all questions are used up."""
        return self._is_exhausted or super().is_complete(step)

    def progress(self) -> dict[str, Any]:
        """As every session, with the groups that wait for the next step."""
        return self.collector.state()()

    def load_progress(self, progress: dict[str, Any]) -> None:
        """As every session."""
        self.collector.load_state(progress)
        file, begin = self.folder.step_in_progress, {"step": progress["step"], "begins": progress["sampler"]}
        left = together(lambda: read_step(file, **begin, encode=self.encoder.encode))
        if all(gather_objects(left is not None)) and left is not None:
            self.collector.go_on_with(left)
        elif self.topology.rank == 0:
            file.unlink(missing_ok=True)  # of another beginning

    def _keep_step_in_progress(self) -> None:
        """Let a resumed run go on with the groups of the step that was interrupted, if one was."""
        left = self.collector.in_progress
        if left is None or self.topology.rank != 0:
            return
        step = left.drawn.step + 1
        try:
            write_step(self.folder.step_in_progress, left)
        except OSError as error:
            self.journal.note(f"the groups of step {step} could not be kept and will be drawn again: {error}")
        else:
            self.journal.note(f"step {step} will go on with the {len(left.drawn.groups)} groups that it has")

    def _learn(self, times: Mapping[str, float]) -> None:
        """What steps take; say once where one could not end within the grace period."""
        self._grace.learn(times)
        short = self._grace.too_short_for(
            sampling=self.config.rollout.questions_per_call is None,  # by several calls is interrupted between them
            evaluating=not self._saves_before_evaluating,
        )
        if short is not None and not self._is_warned:
            self._is_warned = True
            self.journal.note(
                f"'{short[0]}' with a checkpoint may take {short[1]:.1f} s, longer than launch.grace_seconds = "
                f"{self.config.launch.grace_seconds:g}: a run that is told to end in it loses its steps since the last"
            )

    @property
    def _saves_before_evaluating(self) -> bool:
        """Whether each step that is evaluated has its checkpoint by then."""
        save, evaluate = self.config.run.save_every, self.config.evaluation.every
        return save > 0 and evaluate % save == 0

    def _conclude(self) -> None:
        self.journal.summarize(engine=self.engine.name, layout=self.layout())
        self.journal.report()


COUNTS = ("num_tokens", "num_sequences", "skipped_updates")


def merge_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row for the updates of a step: counts added up, maxima kept, the last learning rate, else the mean."""
    merged: dict[str, float] = {}
    for name in updates[0] if updates else ():  # none in a step without groups
        values = [update[name] for update in updates]
        if name in COUNTS:
            merged[name] = sum(values)
        elif name.endswith("_max"):
            merged[name] = max(values)
        elif name == "learning_rate":
            merged[name] = values[-1]
        else:
            merged[name] = sum(values) / len(values)
    return merged
