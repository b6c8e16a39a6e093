"""Train the trials of a study one after the other, in a child process of the sweep."""

import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.config.params import Params
from pipeline.config.sections import SweepConfig
from pipeline.data.token_files import count_tokens
from pipeline.sweep.pruner import best_trial
from pipeline.sweep.search_space import with_values
from pipeline.sweep.study import (
    VALUES,
    WORKER,
    has_work,
    join_study,
    open_storage,
    requeue,
    suggest,
    translate_storage_errors,
)
from pipeline.system.device import give_back_memory, prepare_machine, use_gpu
from pipeline.system.entrypoint import is_out_of_memory, run_stage
from pipeline.system.errors import Interrupted, OutOfSpaceError, PipelineError, Pruned, RunLocked, first_line
from pipeline.system.files import read_json
from pipeline.system.signals import StopSignals, die_with_parent
from pipeline.tracking.descriptions import source_tag
from pipeline.tracking.journal import StepRecord
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import Recorder
from pipeline.training.checkpoint import keep_newest
from pipeline.training.progress import Progress
from pipeline.training.run import Run, open_run
from pipeline.training.target import RULES
from pipeline.training.train import follow, read_config, read_data

REPORTS_PER_EPOCH = 4
OUT_OF_BUDGET = "its budget is used up"
SPENT = "spent"  # user attribute of a trial that was trained: tokens, steps and train_s of its last step


class WorkerConfig(NamedTuple):
    """What a worker reads at its start, as JSON: from its standard input, or on Slurm from a file."""

    root: str  # of the project
    sweep: dict[str, Any]
    params: dict[str, dict[str, Any]]  # of params.yaml when the sweep started
    shared: dict[str, Any]  # settings that all trials share
    sweep_id: str  # random; part of the names of the workers, since containers may share a host name and pids
    threads: int
    parent_run_id: str  # the study's MLflow run
    sweep_pid: int  # the process that starts the worker, except on Slurm
    gpu: str | None = None  # one of gpu_ids(), or HIDDEN; None: all GPUs
    task: str | None = None  # on Slurm: its `task_name`, which a requeue does not change


class Worker:
    """Train trials of a study until there is no more work, or a signal arrives.

    A trial is a training run in the folder `checkpoints/STUDY/FINGERPRINT`. A retry resumes from the checkpoint there,
    on a CPU in the same MLflow run. When a trial has ended its checkpoints are removed; its journal and its samples are
    kept.
    """

    def __init__(self, config: WorkerConfig, stop: StopSignals) -> None:
        self.root, self.stop = Path(config.root), stop
        self.task, self.name = config.task, config.task or worker_name(config.sweep_id, os.getpid())
        self.sweep = SweepConfig.model_validate(config.sweep)
        self.params = Params({**config.params, "train": config.params["train"] | {"threads": config.threads}})
        storage = open_storage(self.sweep.storage, self.root, self.sweep.heartbeat_timeout_s)
        self.study = join_study(self.sweep, config.shared, storage)
        self.recorder = Recorder(self.root)
        self.tags = {"mlflow.parentRunId": config.parent_run_id, "study": self.sweep.study} | source_tag(config.params)

    def work(self) -> None:
        """Train until no work is left. A task that Slurm has started again first re-queues its own trial."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)) if self.task else ():
            if trial.user_attrs.get(WORKER) == self.task:
                requeue(self.study, trial, died=True)
        with self.recorder:
            while self.stop.received is None and has_work(self.study, self.sweep):
                self._work_on_a_trial()
                give_back_memory()

    def _work_on_a_trial(self) -> None:
        try:
            self.study.optimize(self._value, n_trials=1, catch=PipelineError, callbacks=[requeue_interrupted])
        except (UpdateFinishedTrialError, ValueError) as error:
            if isinstance(error, ValueError) and "Cannot tell a FAIL trial" not in str(error):  # Optuna's message
                raise
            silent = f"no heartbeat for {self.sweep.heartbeat_timeout_s:g} s"
            print(f"a trial of this worker was re-queued, after {silent}", flush=True)

    def _value(self, trial: Trial) -> float:
        """Train, and return what the trial has spent at the target. Raises TrialPruned if it misses the target."""
        trial.set_user_attr(WORKER, self.name)
        try:
            return self._train(trial)
        except Pruned as pruned:
            announce(trial, str(pruned))
            raise TrialPruned(str(pruned)) from None
        except Interrupted:
            raise
        except (PipelineError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            trial.set_user_attr("reason", reason)
            announce(trial, f"failed: {reason}")
            raise error if isinstance(error, PipelineError) else OutOfSpaceError(reason) from error

    def _train(self, trial: Trial) -> float:
        values = suggest(trial, self.sweep)
        same = ended_with(values, self.study)
        trial.set_user_attr(VALUES, values)
        if same is not None and same.state is TrialState.PRUNED:
            raise Pruned(f"same values as trial {same.number}, which was pruned")
        if same is not None:
            announce(trial, f"same values as trial {same.number}, {same.value:,.6g} {self.sweep.objective}")
            return float(same.value)
        config = read_config(with_values(self.params, values, self.sweep.micro_batch_tokens), self.root / "data")
        machine = prepare_machine(config.train, config.flops(count_tokens(self.root / "data" / "tokens")))
        data = read_data(config, machine, self.root / "data")
        home = self.root / "checkpoints" / self.sweep.study
        with pruned_if_running(trial), open_run(config, machine, data, home) as run:
            trial.set_user_attr("fingerprint", run.identity["fingerprint"])
            reporter = TrialReporter(trial, run, self.sweep)
            tags = self.tags | run.origin_tags | {"trial": str(trial.number)}
            try:
                with self.recorder.recording(run.folder, dict(run.identity), tags, lambda: run.result):
                    reporter.report_past_steps()
                    if not run.finished:
                        announce(trial, "starts")
                        state, target = run.state, config.target.loss
                        progress = Progress(state.step, state.tokens, run.max_steps, target, f"trial {trial.number}")
                        follow(run, self.stop, progress.show, reporter.after_step)
                    reporter.require_target()
            finally:
                if run.records:
                    trial.set_user_attr(SPENT, spent_at(run.records[-1]))
                if (path := run.folder / RUN_ID).is_file():
                    trial.set_user_attr("mlflow_run_id", path.read_text(encoding="utf-8").strip())
                if self.stop.received is None:
                    keep_newest(run.folder, run.state.step, 0)
        announce(trial, f"reached the target after {reporter.spent:,.6g} {self.sweep.objective}")
        return reporter.spent


class TrialReporter:
    """Report a trial's progress at fixed token intervals, and prune it when it cannot beat the best trial.

    A report is the mean loss over the last epoch, so that it does not depend on which part of the text is hard. There
    are four reports per epoch. If the target is a loss of the held-out text, each evaluation of it is a report, since
    the loss of the training text does not forecast it. The step of a report is `report_step`.
    """

    def __init__(self, trial: Trial, run: Run, sweep: SweepConfig) -> None:
        self.trial, self.run, self.sweep = trial, run, sweep
        self.spent, self._reported = 0.0, 0
        self._interval = max(1, run.steps_per_epoch // REPORTS_PER_EPOCH)  # steps
        self._best = best_trial(trial.study)
        rule = RULES[run.config.target.rule]
        self._held_out = rule.loss if rule.needs_held_out else None

    def report_past_steps(self) -> None:
        """Report the steps of an earlier attempt that was interrupted."""
        for record in self.run.records:
            self._note(record)

    def after_step(self, record: StepRecord) -> None:
        """Process a step. Raises Pruned if the trial can no longer beat the best one."""
        is_reported = self._note(record)
        if self._is_reached():
            return
        if is_reported and self.trial.should_prune():
            raise self._pruned("its forecast is behind")
        if self.sweep.pruner != "none" and self._best is not None and self.spent >= self._best.value:
            raise self._pruned("it has spent as much as")

    def require_target(self) -> None:
        """Report the end of the run. Raises Pruned if it has not reached the target."""
        self._report(len(self.run.records))
        if not self._is_reached():
            raise self._pruned(OUT_OF_BUDGET)

    def _is_reached(self) -> bool:
        target = self.run.config.target
        return RULES[target.rule].is_met(self.run.records, target)

    def _note(self, record: StepRecord) -> bool:
        """Update what was spent; make a report if one is due, and return whether it was."""
        self.spent = spent_at(record)[self.sweep.objective]
        if is_due := self._is_due(record):
            self._report(record.step)
        return is_due

    def _is_due(self, record: StepRecord) -> bool:
        if self._held_out is not None:
            return getattr(record, self._held_out) is not None
        return record.step % self._interval == 0

    def _report(self, step: int) -> None:
        spent = report_step(self.spent, self.sweep.objective)
        if spent > self._reported:
            self.trial.report(self._loss(step), spent)
        self._reported = spent
        self._best = best_trial(self.trial.study)

    def _loss(self, step: int) -> float:
        """The mean loss of the last epoch, or the last evaluated loss of the held-out text."""
        records = self.run.records[:step]
        if self._held_out:
            found = (getattr(record, self._held_out) for record in reversed(records))
            return next((loss for loss in found if loss is not None), math.inf)
        return float(np.mean([record.loss for record in records[-self.run.steps_per_epoch :]]))

    def _pruned(self, why: str) -> Pruned:
        self._report(step := len(self.run.records))
        other = "" if self._best is None or why == OUT_OF_BUDGET else f" trial {self._best.number}"
        return Pruned(f"{self.run.records[-1].tokens:,} tokens, loss {self._loss(step):.2f}: {why}{other}")


def spent_at(record: StepRecord) -> dict[str, float]:
    """What a run has spent after a step, by objective; train_s is in seconds."""
    return {"tokens": record.tokens, "steps": record.step, "train_s": record.train_s}


def report_step(spent: float, objective: str) -> int:
    """Convert what was spent to the integer step of an Optuna report: tokens, steps or milliseconds."""
    return round(1000 * spent) if objective == "train_s" else int(spent)


def ended_with(values: dict[str, Any], study: Study) -> FrozenTrial | None:
    """The trial that has ended with the same values, which are not trained again; None if there is none."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    same = [trial for trial in ended if trial.user_attrs.get(VALUES) == values]
    return min(same, key=lambda trial: trial.state is TrialState.PRUNED, default=None)  # perhaps it was not trained


@contextmanager
def pruned_if_running(trial: Trial) -> Iterator[None]:
    """Raise Pruned instead of RunLocked if another worker trains the same values, which discrete choices allow."""
    try:
        yield
    except RunLocked:
        values = trial.user_attrs[VALUES]
        for other in trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if other.number != trial.number and other.user_attrs.get(VALUES) == values:
                raise Pruned(f"same values as trial {other.number}, which is running") from None
        raise


def requeue_interrupted(study: Study, trial: FrozenTrial) -> None:
    """A callback of `study.optimize`: re-queue a trial that a signal ended; other failed trials have a `reason`."""
    if trial.state is TrialState.FAIL and "reason" not in trial.user_attrs:
        requeue(study, trial)


def worker_name(sweep_id: str, pid: int) -> str:
    """The name of a worker that is a child of the sweep."""
    return f"{socket.gethostname()}:{sweep_id}:{pid}"


def task_name(job: str, number: int) -> str:
    """The name of a worker that is a task of a job on Slurm."""
    return f"slurm:{job}_{number}"


def announce(trial: Trial, what: str) -> None:
    values = ", ".join(f"{key} {value}" for key, value in trial.user_attrs.get(VALUES, {}).items())
    print(f"trial {trial.number}: {what} ({values})", flush=True)


def main() -> None:
    """Work as a child of the sweep, or, with the arguments FILE NUMBER, as a task of a job on Slurm."""
    if sys.argv[1:]:
        path, number = sys.argv[1:]
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ["SLURM_JOB_ID"]
        config = WorkerConfig(**read_json(Path(path))[int(number)])._replace(task=task_name(job, int(number)))
    else:
        config = WorkerConfig(**json.loads(sys.stdin.readline()))
        if os.getppid() != config.sweep_pid:  # the sweep has died during the imports, before `die_with_parent`
            return
    if config.gpu is not None:
        use_gpu(config.gpu)
    with StopSignals() as stop:
        worker = Worker(config, stop)
        with translate_storage_errors(worker.sweep):
            worker.work()
        if stop.received is not None:
            sys.exit(128 + stop.received)  # the sweep sent the signal, and prints the message


if __name__ == "__main__":
    die_with_parent()
    run_stage(main)
