"""Run the workers of a study as one array job of a Slurm cluster, and follow it until it has ended."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.cluster import jobs
from pipeline.config.sections import SlurmConfig, SweepConfig
from pipeline.sweep import worker
from pipeline.sweep.study import VALUES, WORKER, has_work, latest_trials, requeue
from pipeline.sweep.worker import WorkerConfig, task_name
from pipeline.system.errors import InputError
from pipeline.system.files import write_json
from pipeline.system.signals import StopSignals

CONFIGS = "workers.json"  # in the study's folder: a WorkerConfig for each task of its job


def run_on_slurm(
    study: Study, sweep: SweepConfig, configs: Sequence[WorkerConfig], slurm: SlurmConfig, home: Path, stop: StopSignals
) -> jobs.JobFailed | None:
    """Submit the workers, unless a job of the study has not ended, and follow the job to its end.

    Return the failure of the job, if one of its tasks failed and trials are left. When `sweep.budget_s` is over, the
    job is cancelled. A job that has not ended keeps the settings that it was submitted with: if they leave work, the
    workers are submitted after it. Raises Interrupted after a signal, which leaves the job running.
    """
    name = f"study-{sweep.study}"
    deadline = time.monotonic() + (sweep.budget_s or float("inf"))
    _requeue_lost(study, name)
    if job := jobs.find_live(name):
        print(
            f"job {job.id} runs the workers of study {sweep.study}: no others are submitted before its end", flush=True
        )
        failure = _follow(study, sweep, job, stop, deadline)
        if failure or time.monotonic() > deadline:
            return failure
    if not has_work(study, sweep):
        return None
    write_json(path := home / CONFIGS, [config._asdict() for config in configs])
    commands = [[worker.__name__, str(path.absolute()), str(number)] for number in range(len(configs))]
    return _follow(study, sweep, jobs.submit(name, commands, slurm), stop, deadline)


def _follow(
    study: Study, sweep: SweepConfig, job: jobs.Job, stop: StopSignals, deadline: float
) -> jobs.JobFailed | None:
    """Follow a job to its end; return its failure, if trials are left and the time of the sweep is not over."""
    progress, failure = _Progress(study, sweep.objective, job, deadline), None
    try:
        jobs.wait(job, stop, progress.show)
    except jobs.JobFailed as error:
        failure = error
    _requeue_lost(study, job.name)
    return failure if has_work(study, sweep) and time.monotonic() <= deadline else None


class _Progress:
    """Prints each trial that ends, and cancels the job when the time of the sweep is over.

    The output of a job's only task, which says the same, is printed by `jobs.wait`.
    """

    def __init__(self, study: Study, objective: str, job: jobs.Job, deadline: float) -> None:
        self.study, self.objective, self.job, self._cancel_at = study, objective, job, deadline
        self._seen = {trial.number for trial in latest_trials(study) if self._has_ended(trial)}

    def show(self) -> None:
        if time.monotonic() > self._cancel_at:
            self._cancel_at = self._cancel()
        for trial in latest_trials(self.study) if len(self.job.commands) > 1 else ():
            if self._has_ended(trial) and trial.number not in self._seen:
                self._seen.add(trial.number)
                print(f"trial {trial.number}: {self._result(trial)}", flush=True)

    def _cancel(self) -> float:
        """Cancel the job; return when to try again, in seconds of the monotonic clock."""
        try:
            jobs.cancel(self.job.id)
        except InputError as error:  # the controller restarts, or has too much to do
            print(f"job {self.job.id} ({self.job.name}) is not cancelled yet: {error}", flush=True)
            return time.monotonic() + jobs.MAX_POLL_S
        return math.inf

    @staticmethod
    def _has_ended(trial: FrozenTrial) -> bool:
        """Whether a trial has a result; one that was interrupted is queued again."""
        return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "reason" in trial.user_attrs

    def _result(self, trial: FrozenTrial) -> str:
        values = ", ".join(f"{key} {value}" for key, value in trial.user_attrs.get(VALUES, {}).items())
        if trial.state is TrialState.COMPLETE:
            return f"reached the target after {trial.value:,.6g} {self.objective} ({values})"
        if trial.state is TrialState.PRUNED:
            return f"did not reach the target ({values})"
        return f"failed: {trial.user_attrs['reason']} ({values})"


def _requeue_lost(study: Study, name: str) -> None:
    """Re-queue the trials of tasks that have ended, which nobody would resume before the heartbeat timeout."""
    running = study.get_trials(states=(TrialState.RUNNING,))
    known = jobs.find_jobs(name) if running else []
    names = {task_name(job.id, task.number) for job in known for task in job.tasks if task.ended}
    for trial in running:
        if trial.user_attrs.get(WORKER) in names:
            requeue(study, trial, died=True)
