"""A worker: takes trials from the queue until there are none, and runs each one's training jobs."""

from __future__ import annotations

import os
import socket
import statistics
import time
import warnings

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from perl_megatron.config.load import load_config
from perl_megatron.config.sweep_domain import Choice
from perl_megatron.config.sweep_file import Sweep
from perl_megatron.errors import UserError
from perl_megatron.launch.failures import EXIT_FAILURE, EXIT_STOPPED
from perl_megatron.launch.job_step import JobStep, SlurmJob
from perl_megatron.runtime.signals import StopRequest
from perl_megatron.sweep.check import has_multi_node_runs, measures
from perl_megatron.sweep.file_lock import FileLock
from perl_megatron.sweep.storage import (
    PREEMPTED,
    REFUSED,
    may_go_on,
    point_of,
    put_back_unfinished,
    unfinished_points,
)
from perl_megatron.sweep.study import QUEUE_LOCK, make_sampler, open_study, suggest
from perl_megatron.sweep.trial_run import RunFailedError, RunStoppedError, TrialRun

IDLE_SECONDS = 2.0
"""Between two looks at a queue that is empty while other workers are busy."""
BEGUN, VALUES, FAILURE = "begun", "values", "failure"
"""User attributes of a trial: its own number once heartbeats are sent; metric → seed → value; why it failed."""
RUN_LOCK = "run.lock"


class _InterruptedError(Exception):
    """The worker was asked to stop, or its run was by somebody else."""


class _TakenAwayError(Exception):
    """This worker was silent for too long, and the trial was given to another one."""


class Worker:
    """One worker of a sweep."""

    def __init__(self, sweep: Sweep, stop: StopRequest):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        self._sweep, self._stop = sweep, stop
        self._queue = FileLock(sweep.folder / QUEUE_LOCK)
        self._study = open_study(sweep, self._queue)
        self._holds_queue = self._is_run_stopped = False
        self._job: SlurmJob | None = None
        self._measures = measures(sweep)
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def work(self) -> int:
        """Until the queue is empty and no other worker's trial could come back to it.

        Returns the exit status: 0 where every point has its value or was pruned, 1 where some have failed for good, 75
        where the worker was asked to stop, or its run was: then its machine is about to be taken. UserError, with no
        trial taken, where Slurm does not say which machines there are for runs of several.
        """
        if SlurmJob.is_here() and has_multi_node_runs(self._sweep):
            try:
                self._job = SlurmJob.around(self._idle)
            except _InterruptedError:
                return EXIT_STOPPED
        while not self._is_stopped():
            try:
                self._queue.acquire(self._idle)
                self._holds_queue = True
                waiting = self._waiting()
                if waiting:
                    self._take(waiting[0])
                elif not self._trials(TrialState.RUNNING):
                    break
            except _InterruptedError:
                break
            finally:
                self._let_queue_go()
            self._check_failures()
            if not waiting:
                time.sleep(IDLE_SECONDS)
        if self._is_stopped():
            return EXIT_STOPPED
        return EXIT_FAILURE if self._failed() else 0

    def _is_stopped(self) -> bool:
        return self._stop.received is not None or self._is_run_stopped

    def _idle(self) -> None:
        if self._stop.received is not None:
            raise _InterruptedError

    def _let_queue_go(self) -> None:
        if self._holds_queue:
            self._queue.release()
            self._holds_queue = False

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _waiting(self) -> list[FrozenTrial]:
        """The queue, with all that was interrupted put back into it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        storage = self._study._storage
        for trial in self._trials(TrialState.RUNNING):
            # Workers hold the queue until their first heartbeat is there. So this one's died before, and without a
            # heartbeat a database would never find it silent.
            if trial.user_attrs.get(BEGUN) != trial.number:
                storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
                storage.set_trial_user_attr(trial._trial_id, BEGUN, trial.number)
        put_back_unfinished(self._study, self._sweep.workers.retries)
        return self._trials(TrialState.WAITING)

    def _take(self, first: FrozenTrial) -> None:
        """Run the first trial of the queue, which this worker holds until the trial's values are chosen."""
        self._study.sampler = make_sampler(self._sweep, point_of(first))
        try:
            self._study.optimize(
                self._objective, n_trials=1, catch=(RunFailedError, _InterruptedError), callbacks=[self._after]
            )
        except (ValueError, UpdateFinishedTrialError) as error:
            # Optuna's words for an outcome of a trial that somebody else has ended meanwhile.
            if isinstance(error, ValueError) and "Cannot tell" not in str(error):
                raise
            self._say("was silent for too long: another worker has its trial")
        except UnboundLocalError as error:
            # Optuna's own, where it cannot note how a trial ended: what it means is the error before.
            meant = error.__context__
            if isinstance(meant, StorageInternalError):
                raise meant from meant.__cause__
            raise

    def _objective(self, trial: optuna.Trial) -> float:
        values = {domain.name: suggest(trial, domain) for domain in self._sweep.space}
        self._study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        trial.set_user_attr(BEGUN, trial.number)
        self._let_queue_go()
        frozen = self._frozen(trial)
        folder = self._sweep.folder / f"point-{point_of(frozen):04d}"
        lock = FileLock(folder / RUN_LOCK)
        try:
            self._await_run(lock, trial)
            try:
                return self._run_seeds(trial, values, lock)
            except UserError as error:  # it would be the same for every worker
                raise RunFailedError(str(error), user_error=True) from error
        except UpdateFinishedTrialError as error:
            raise _TakenAwayError from error
        except (KeyboardInterrupt, _InterruptedError, RunStoppedError) as error:
            self._is_run_stopped = isinstance(error, RunStoppedError)
            trial.set_user_attr(PREEMPTED, frozen.user_attrs.get(PREEMPTED, 0) + 1)
            raise _InterruptedError from error
        except RunFailedError as error:
            trial.set_user_attr(FAILURE, str(error))
            trial.set_user_attr(REFUSED, error.user_error)
            raise
        finally:
            lock.close()

    def _run_seeds(self, trial: optuna.Trial, values: dict[str, Choice], lock: FileLock) -> float:
        section = self._sweep.sweep
        measured: dict[str, dict[str, float | None]] = {measure.text: {} for measure in self._measures}
        for index, seed in enumerate(section.seeds):
            overrides = self._sweep.overrides(values, seed)
            config = load_config(section.config, overrides).config
            folder, step = lock.path.parent / f"seed-{seed}", JobStep.of(config, self._job)
            run = TrialRun(section.config, overrides, folder, lock=lock.descriptor, step=step)
            self._watch(run, trial, reports=index == 0)
            for measure in self._measures:
                measured[measure.text][str(seed)] = run.value(measure)
            trial.set_user_attr(VALUES, measured)
            finished = [value for value in measured[section.metric].values() if value is not None]
            if len(finished) <= index:
                raise RunFailedError(f"{run.folder.metrics} has no value of {section.metric}", user_error=True)
            self._drop_weights(run)
            if index > 0:
                trial.report(statistics.fmean(finished), (index + 1) * config.run.steps)
                self._prune_if_due(trial)
        return statistics.fmean(finished)

    def _watch(self, run: TrialRun, trial: optuna.Trial, *, reports: bool) -> None:
        """The run until its end; with ``reports`` its values go to the pruner."""
        name, last_look = f"{run.folder.root.parent.name}, {run.folder.root.name}", time.monotonic()
        if not run.is_done:
            self._say(f"{name}: {'continues' if run.start() else 'begins'}; its output is in {run.log}")
        reported = self._frozen(trial).intermediate_values
        try:
            for observation in run.wait(self._measures[0].metric):
                if self._stop.received is not None:
                    raise _InterruptedError
                if time.monotonic() - last_look > self._sweep.workers.heartbeat:
                    last_look = time.monotonic()
                    self._check_mine(trial)
                if observation is not None and reports and observation.step not in reported:
                    trial.report(observation.value, observation.step)
                    self._prune_if_due(trial)
        except (_TakenAwayError, UpdateFinishedTrialError):
            run.kill()  # the other worker waits for it
            raise
        except BaseException as error:
            run.stop(self._sweep.workers.stop_seconds)
            if isinstance(error, optuna.TrialPruned):
                self._drop_weights(run)
            raise
        self._say(f"{name}: done, {self._measures[0].text} = {run.value(self._measures[0])}")

    def _drop_weights(self, run: TrialRun) -> None:
        """Of a run that will not be continued."""
        if not self._sweep.workers.keep_weights:
            run.drop_weights()

    def _prune_if_due(self, trial: optuna.Trial) -> None:
        if trial.should_prune():
            raise optuna.TrialPruned

    def _await_run(self, lock: FileLock, trial: optuna.Trial) -> None:
        """Until no process of an earlier worker is left in the folder: it gets SIGTERM when its worker dies."""
        began = time.monotonic()

        def on_wait() -> None:
            self._idle()
            self._check_mine(trial)
            if time.monotonic() - began > self._sweep.workers.stop_seconds:
                what = f"processes of an earlier worker are still at work in {lock.path.parent}"
                raise RunFailedError(what, user_error=False)

        lock.acquire(on_wait)
        self._check_mine(trial)  # another worker may have had it, and let it go

    def _check_mine(self, trial: optuna.Trial) -> None:
        if self._frozen(trial).state != TrialState.RUNNING:
            raise _TakenAwayError

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[trial.number]

    def _after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """What becomes of a trial that has ended: one that was interrupted, or crashed, goes back into the queue."""
        name = f"point-{point_of(trial):04d}"
        if trial.state == TrialState.PRUNED:
            self._say(f"{name}: pruned after {trial.last_step} steps")
        if trial.state != TrialState.FAIL:
            return
        retries = self._sweep.workers.retries
        if not self._holds_queue:
            self._queue.acquire(lambda: None)
            self._holds_queue = True
        put_back_unfinished(study, retries)
        self._let_queue_go()
        outcome = "is in the queue again" if may_go_on(trial, retries) else "failed for good"
        self._say(f"{name}: {outcome}. {trial.user_attrs.get(FAILURE, '')}")

    def _failed(self) -> dict[int, str]:
        return failed_points(self._study, self._sweep.workers.retries)

    def _check_failures(self) -> None:
        failed = self._failed()
        if len(failed) >= self._sweep.workers.max_failures:
            numbers = ", ".join(map(str, sorted(failed)))
            raise UserError(
                f"{len(failed)} points of the sweep have failed: {numbers}. The last one's reason:\n"
                + list(failed.values())[-1],
                where=str(self._sweep.folder),
                fix=f"mend the cause and begin them again ({self._sweep.command('--retry-failed')}), or raise "
                "workers.max_failures",
            )

    def _say(self, text: str) -> None:
        print(f"[{self._name}] {text}", flush=True)


def failed_points(study: optuna.Study, retries: int) -> dict[int, str]:
    """The points that no trial has carried out, nor will, and why the last one did not."""
    return {
        point: trial.user_attrs.get(FAILURE, "its worker died")
        for point, trial in unfinished_points(study).items()
        if not may_go_on(trial, retries)
    }
