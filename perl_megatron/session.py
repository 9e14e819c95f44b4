"""A run in progress: what training needs around the algorithm — weights to the engine, logs, checkpoints, the end.

Every rank holds one and calls the same methods; only rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from perl_megatron.checkpoint.background import BackgroundWriter
from perl_megatron.checkpoint.disk import write_failure
from perl_megatron.checkpoint.manifest import list_checkpoints, on_rank_zero
from perl_megatron.checkpoint.retention import Retention
from perl_megatron.config.load import LoadedConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.question_stream import QuestionStream
from perl_megatron.data_idle import DataIdle
from perl_megatron.errors import UserError
from perl_megatron.export import export_policy, exported_step
from perl_megatron.launch.failures import stop_status
from perl_megatron.observability.journal import Journal
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.observability.metrics import find_metric
from perl_megatron.observability.phases import Phases
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.observability.run_lock import RunLock
from perl_megatron.runtime.agreement import Agreement
from perl_megatron.runtime.collective import any_rank, gather_objects, together
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.runtime.topology import Topology
from perl_megatron.runtime.watchdog import Watchdog
from perl_megatron.skipped import SkippedUpdates
from perl_megatron.train.actor import Actor
from perl_megatron.train.batch import TrainingSequence


class Session:
    """What supervised and GRPO training share."""

    supervised = False
    """Whether the loss is cross-entropy."""

    def __init__(
        self,
        loaded: LoadedConfig,
        topology: Topology,
        actor: Actor,
        encoder: PromptEncoder,
        questions: QuestionStream,
        *,
        total_steps: int,
        resume: bool,
        stop: StopRequest,
        memory: PeakMemory | None,
        watchdog: Watchdog,
    ):
        self.config = loaded.config
        self.topology, self.actor, self.encoder = topology, actor, encoder
        self.questions, self.total_steps = questions, total_steps
        self.folder = RunFolder.of(loaded.config)
        self._lock = RunLock(self.folder.lock)
        self._loaded, self._resume, self._stop = loaded, resume, stop
        self._memory = memory
        self._saved_step = self._first_step = -1
        self._owes_score = False
        self._writer = BackgroundWriter(
            asynchronous=self.config.run.asynchronous_checkpoints,
            timeout_seconds=self.config.deadlines.collective_timeout,
        )
        self._agreement = Agreement(self.config.deadlines.collective_timeout)
        self._watchdog = watchdog
        _check_metric(self.config.run.keep_best)
        self._skipped = SkippedUpdates(self.config, encoder.image, supervised=self.supervised, note=self._note)
        self.data_idle = DataIdle(self.config.data, self._note)
        self._journal: Journal | None = None
        self.phases = Phases(self._enter_phase, watchdog.leave)
        self.exit_status = 0

    def restore(self) -> int:
        """Take up the newest good checkpoint when resuming, open the journal; the number of steps already done.

        A run that ended before its first checkpoint begins anew. UserError where another job trains it.
        """
        with self._watchdog.phase("start"):
            return self._restore()

    def _restore(self) -> int:
        step, seconds = 0, 0.0
        if self._resume:
            on_rank_zero(self._lock.acquire, what="the run folder")
        run = gather_objects(self.folder.read_identity() if self.topology.rank == 0 else None)[0]
        checkpoint = self.actor.newest_checkpoint(self.folder.checkpoints, run=run) if self._resume else None
        if self._resume and checkpoint is None and any_rank(bool(list_checkpoints(self.folder.checkpoints))):
            raise UserError(
                "there is no good checkpoint to resume from",
                where=str(self.folder.checkpoints),
                fix="put a good one there, or remove the run folder and start again without --resume",
            )
        if checkpoint is not None:
            extra = self.actor.restore(checkpoint, verify=False)  # it has just been verified
            step, seconds = extra["step"], extra["seconds"]
            self.load_progress(extra)
            self._skipped.load_state(extra.get("skipped", ()))  # checkpoints from before it was kept say nothing
            self._saved_step = step
        self._first_step = step
        self.questions.prepare()
        on_rank_zero(self._create_folder, what="the run folder")
        self._journal = together(lambda: self._open_journal(step, seconds))
        if checkpoint is not None:  # the run may have ended between a measurement and what follows from it
            self._score_late(step)
        elif self._resume:
            self.journal.note("no checkpoint was written yet: the run begins anew")
        self._skipped.forget_after(step)
        # What was done until here belongs to no step; images were checked at load.
        self.encoder.take_waits()
        self.phases.take()
        return step

    def _open_journal(self, step: int, seconds: float) -> Journal:
        try:
            return Journal(
                self.folder,
                total_steps=self.total_steps,
                first_step=step,
                writes=self.topology.rank == 0,
                image_of=self.encoder.image if self.config.run.record_rollouts else None,
                seconds_before=seconds,
                memory=self._memory,
            )
        except OSError as error:
            raise write_failure(error, "the run's logs", self.folder.root) from error

    @property
    def journal(self) -> Journal:
        """The run's journal, open after ``restore``."""
        assert self._journal is not None, "restore() opens the journal"
        return self._journal

    def stop_requested(self) -> bool:
        """Whether Ctrl-C, SIGTERM or SIGUSR1 reached any rank; the same answer on all."""
        self._agree("whether to stop")
        return self._stop.requested(any_rank)

    def update(self, step: int, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
        """One update of the policy, which has made ``step`` steps; a skipped one's batch is kept. UserError after many.

        Returns what ``Actor.update`` does.
        """
        metrics = (self.actor.supervised_update if self.supervised else self.actor.update)(sequences)
        try:
            self._skipped.follow(step, sequences, metrics)
        except UserError:  # on all ranks, so that the checkpoint that is being written can be completed
            self._await_save()
            raise
        return metrics

    def save_if_due(self, step: int) -> None:
        """Checkpoint every `run.save_every` steps. A checkpoint that fails is reported, and the run goes on."""
        every = self.config.run.save_every
        if every and step % every == 0 and step != self._saved_step:
            with self.phases("save", step=step):
                self._await_save()
                try:
                    self._begin_save(step)
                except UserError as error:
                    self.journal.note(f"the checkpoint of step {step} failed, and the run goes on:\n{error}")

    def save(self, step: int) -> None:
        """Checkpoint, unless this step is saved already, and wait until it is complete. UserError if it fails."""
        with self.phases("save", step=step):
            self._await_save()
            if step != self._saved_step:
                self._begin_save(step)
                self._writer.wait()

    def _await_save(self) -> None:
        """Until the checkpoint before, which may have failed, is out of the way, and has the score that came late."""
        owes_score, self._owes_score = self._owes_score, False
        try:
            self._writer.wait()
        except UserError:
            self._saved_step = -1
            self.journal.note("the last checkpoint failed, see above; the run goes on, and saves again when it is due")
            return
        if owes_score:
            self._score_late(self._saved_step)

    def score_if_saved(self, step: int) -> None:
        """After a measurement at ``step``: its checkpoint, if it was written before, is one of those compared.

        One that is still being written is so when it is waited for the next time.
        """
        if self.config.run.keep_best is None or step != self._saved_step:
            return
        self._owes_score = True
        if not any_rank(self._writer.is_busy):
            with self.phases("save", step=step):
                self._await_save()

    def _retention(self, step: int) -> Retention:
        run = self.config.run
        return Retention(
            keep=run.keep_checkpoints,
            run=self.folder.read_identity() if self.topology.rank == 0 else None,
            metric=run.keep_best,
            highest=run.best_is == "highest",
            value=self._score(step),
        )

    def _score(self, step: int) -> float | None:
        """The value of `run.keep_best` at a step, where this rank has logged it."""
        name = self.config.run.keep_best
        return None if name is None else self.journal.value(step, name)

    def _score_late(self, step: int) -> None:
        """Tell the checkpoints up to this step, which is saved already, what was measured after they were written."""
        newest, retention = self.folder.checkpoints / f"step-{step:08d}", self._retention(step)
        try:
            on_rank_zero(lambda: retention.score_late(newest, self._score), what="the score of a checkpoint")
        except UserError as error:
            self.journal.note(f"{error}\nthe checkpoint is whole, but does not count as the best one")

    def _begin_save(self, step: int) -> None:
        retention = self._retention(step)
        on_rank_zero(self.journal.sync, what="the metrics")
        extra = {"step": step, "seconds": self.journal.seconds, "skipped": self._skipped.state(), **self.progress()}
        self._writer.start(self.actor.prepare_save(self.folder.checkpoints, step, extra, retention))
        self._saved_step = step

    def save_times(self) -> dict[str, float]:
        """What the last checkpoint took beside the training; once, as metrics of a step."""
        return self._writer.take_times()

    def progress(self) -> dict[str, Any]:
        """Where a resumed run has to go on with the records; JSON."""
        return {"sampler": self.questions.state_dict()}

    def position(self) -> dict[str, Any]:
        """What the ranks have to agree on before they draw questions."""
        return {"questions_drawn": self.questions.num_drawn}

    def load_progress(self, progress: dict[str, Any]) -> None:
        """Go on from what ``progress`` gave."""
        self.questions.load_state_dict(progress["sampler"])

    @contextmanager
    def saved_on_user_error(self, step: int) -> Iterator[None]:
        """Checkpoint before a UserError that all ranks meet together ends the run, so that no step is lost."""
        try:
            yield
        except UserError as error:
            with suppress(UserError):  # the writer reports it; what ends the run is the first error
                self.save(step)
            self.note_failure(error)
            raise

    def note_failure(self, error: UserError) -> None:
        """Keep what helps to understand the error that ends the run."""

    def finish(self, step: int) -> None:
        """The last checkpoint; where all steps are done also the exported policy and the report."""
        self.save(step)
        if not self.is_complete(step):
            self.journal.note(f"stopped after step {step} of {self.total_steps}; continue with --resume")
            self.exit_status = stop_status()
        else:
            with self.phases("export", step=step):
                self._export(step)
            self._conclude()

    def is_complete(self, step: int) -> bool:
        """Whether there is nothing to do after ``step`` steps."""
        return step >= self.total_steps

    def close(self) -> None:
        """Release everything, whether the run ended well or not; each part though one before it fails."""
        with ExitStack() as parts:
            parts.callback(self._lock.release)
            if self._journal is not None:
                parts.callback(self._journal.close)
            parts.callback(self._writer.close)

    def _export(self, step: int) -> None:
        """Write the policy as a Hugging Face folder."""
        if step == self._first_step and any_rank(exported_step(self.folder) == step):
            return  # a finished run that was resumed has nothing new
        writes = self.topology.rank == 0
        export_policy(self.folder, step, self.actor.weights(), self.config.model.path, writes=writes)

    def layout(self) -> str:
        """The layout in words."""
        sizes = (
            f"{axis} {getattr(self.topology, f'{axis}_size')}" for axis in ("tensor", "pipeline", "context", "data")
        )
        return " × ".join(sizes)

    def _create_folder(self) -> None:
        RunFolder.create(self._loaded, resume=self._resume)
        self._lock.acquire()

    def _note(self, text: str) -> None:
        self.journal.note(text)

    def _enter_phase(self, name: str, facts: Mapping[str, Any]) -> None:
        """Watch it, show it, and make sure that all ranks are about to do the same."""
        self._watchdog.enter(name)
        if self._journal is not None:
            self._journal.phase(name)
        if self.phases.depth == 1:
            self._agree(name, facts)

    def _agree(self, what: str, facts: Mapping[str, Any] | None = None) -> None:
        """Make sure that all ranks are about to do the same; DivergedError on all of them where they are not."""
        self._agreement.compare({"phase": what, "updates": self.actor.num_updates, **(facts or {})})

    def _conclude(self) -> None:
        """What a finished run leaves besides its policy."""


def _check_metric(name: str | None) -> None:
    if name is not None and find_metric(name) is None:
        raise UserError(
            f"no metric is called {name!r}", where="run.keep_best", fix="name one of metrics.jsonl: evaluation/accuracy"
        )
