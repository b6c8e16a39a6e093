"""worker: a process of a sweep, `python -m pipeline.sweep.worker` -> trials, one after the other, while there is work.

Its standard input gives its WorkerConfig as JSON. A trial is a training run like any other, in
`checkpoints/STUDY/FINGERPRINT/`: what a worker left there is taken up where it was left, in the same MLflow run. Once a
trial has ended, its checkpoints go; its journal and samples stay.
"""

import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.config.params import Params
from pipeline.config.sections import SweepConfig
from pipeline.data.batches import TrainingData
from pipeline.sweep.pruner import forecast, forecast_alone
from pipeline.sweep.search_space import with_values
from pipeline.sweep.study import (
    COST_OF_TOKEN,
    best_trial,
    curve_of,
    ended_with,
    has_work,
    join_study,
    naming_dead_storage,
    open_storage,
    suggest,
    take_up_again,
)
from pipeline.system.device import Machine, give_back_memory, prepare_machine
from pipeline.system.entrypoint import is_out_of_memory, run_stage
from pipeline.system.errors import Interrupted, PipelineError, Pruned
from pipeline.system.signals import StopSignals, die_with_parent
from pipeline.tracking.journal import StepRecord
from pipeline.tracking.mlflow_store import first_line
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import Recorder
from pipeline.training.checkpoint import keep_newest
from pipeline.training.config import RunConfig
from pipeline.training.run import Run, open_run
from pipeline.training.target import RULES
from pipeline.training.train import follow, read_data

RUNGS_PER_PASS = 4
WORKER = "worker"  # user attribute of a trial: host, project and process that have it


class WorkerConfig(NamedTuple):
    """What a worker is told."""

    root: str  # of the project
    sweep: dict[str, Any]
    params: dict[str, dict[str, Any]]  # what params.yaml said when the sweep began
    question: dict[str, Any]
    worker: int  # counts from 0
    threads: int
    parent_run_id: str  # MLflow's, of the study


class Worker:
    """Trains trials of a study until there is no more work, or a signal comes."""

    def __init__(self, orders: WorkerConfig, stop: StopSignals) -> None:
        self.root, self.stop = Path(orders.root), stop
        self.sweep = SweepConfig.model_validate(orders.sweep)
        train = orders.params["train"] | {"threads": orders.threads}
        self.params = Params({**orders.params, "train": train})
        storage = open_storage(self.sweep.storage, self.root, self.sweep.heartbeat_timeout_s)
        self.study = join_study(self.sweep, orders.question, storage, orders.worker)
        self.tags = {"mlflow.parentRunId": orders.parent_run_id, "study": self.sweep.study}
        self._texts: dict[tuple[bool, int], TrainingData] = {}
        self._left: int | None = None  # number of the trial that a signal made it leave

    def work(self) -> None:
        while self.stop.received is None and has_work(self.study, self.sweep):
            try:
                self.study.optimize(self._value, n_trials=1, catch=(PipelineError, MemoryError), gc_after_trial=True)
            except UpdateFinishedTrialError:
                print(
                    f"a trial was given to another worker: this one gave no sign for {self.sweep.heartbeat_timeout_s:g} s"
                )
            if self._left is not None:
                take_up_again(self.study, self._left)
            give_back_memory()

    def _value(self, trial: Trial) -> float:
        """What the trial spent until it reached the target. Raises TrialPruned where it did not; see the module."""
        trial.set_user_attr(WORKER, worker_name(self.root, os.getpid()))
        try:
            return self._train(trial)
        except Pruned as pruned:
            announce(trial, str(pruned))
            raise TrialPruned(str(pruned)) from None
        except Interrupted:
            self._left = trial.number
            raise
        except (PipelineError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            trial.set_user_attr("reason", reason := f"{type(error).__name__}: {first_line(error)}")
            announce(trial, f"failed: {reason}")
            if isinstance(error, RuntimeError):
                raise MemoryError(reason) from error
            raise

    def _train(self, trial: Trial) -> float:
        values = suggest(trial, self.sweep)
        if same := ended_with(values, self.study):
            return repeat(same, trial)
        trial.set_user_attr("values", values)
        config = RunConfig.of(with_values(self.params, values, self.sweep.micro_batch_tokens))
        machine = prepare_machine(config.train, config.flops)
        with open_run(
            config, machine, self._text(config, machine), self.root / "checkpoints" / self.sweep.study
        ) as run:
            trial.set_user_attr("fingerprint", run.identity["fingerprint"])
            race = Race(trial, run, self.sweep)
            tags = self.tags | {"trial": str(trial.number), "mlflow.runName": f"{self.sweep.study}-{trial.number}"}
            try:
                with Recorder(self.root, run.folder, dict(run.identity), tags):
                    race.go_on_from(run)
                    if not run.finished:
                        follow(run, self.stop, race.after_step)
                    race.require_target()
            finally:
                if (path := run.folder / RUN_ID).is_file():
                    trial.set_user_attr("mlflow_run_id", path.read_text(encoding="utf-8").strip())
                if self.stop.received is None:
                    keep_newest(run.folder, 0, also=None)
        announce(trial, f"reached the target for {race.spent:,.6g} {self.sweep.objective}")
        return race.spent

    def _text(self, config: RunConfig, machine: Machine) -> TrainingData:
        key = (config.model.fold_vocab, config.model.vocab_size)
        if key not in self._texts:
            self._texts[key] = read_data(config, machine, self.root / "data")
        return self._texts[key]


class Race:
    """A trial against the best: what it spent, its reports at fixed rungs of tokens, and its end where it cannot win.

    A rung is a quarter of a pass; what is reported there is the mean loss over the last pass, which has no stairs.
    """

    def __init__(self, trial: Trial, run: Run, sweep: SweepConfig) -> None:
        self.trial, self.run, self.sweep = trial, run, sweep
        self.spent, self._reported = 0.0, 0
        self._records: list[StepRecord] = []
        self._rung_tokens = math.ceil(run.text.train.size / RUNGS_PER_PASS)
        self._best = best_trial(trial.study)
        self._start_loss = math.log(run.config.model.vocab_size)

    def go_on_from(self, run: Run) -> None:
        """Report what an earlier attempt had come to."""
        for record in run.records:
            self._note(record)

    def after_step(self, record: StepRecord) -> None:
        """Take note of a step; raise Pruned where the trial cannot win any more."""
        at_rung = self._note(record)
        if self.reached:
            return
        if at_rung and self.trial.should_prune():
            raise self._pruned("it would end behind")
        if self.sweep.pruner != "none" and self._best is not None and self.spent >= self._best.value:
            raise self._pruned("it has spent as much as")

    @property
    def reached(self) -> bool:
        target = self.run.config.target
        return RULES[target.rule].is_met(self._records[-target.average_steps :], target)

    def require_target(self) -> None:
        """End the curve where the run has ended; raise Pruned where that is not the target."""
        self._report()
        if not self.reached:
            raise self._pruned("its budget is spent")

    def _note(self, record: StepRecord) -> bool:
        """Whether the step was the first at a new rung, which is then reported."""
        before = self._records[-1].tokens if self._records else 0
        self._records.append(record)
        spent = {"tokens": record.tokens, "steps": record.step, "train_s": record.train_s}
        self.spent = spent[self.sweep.objective]
        if record.tokens // self._rung_tokens == before // self._rung_tokens:
            return False
        self._report()
        return True

    def _report(self) -> None:
        tokens = self._records[-1].tokens
        self.trial.set_user_attr(COST_OF_TOKEN, self.spent / tokens)
        if tokens > self._reported:
            self.trial.report(self._loss(), tokens)
        self._reported = tokens
        self._best = best_trial(self.trial.study)

    def _loss(self) -> float:
        return float(np.mean([record.loss for record in self._records[-self.run.steps_per_epoch :]]))

    def _pruned(self, why: str) -> Pruned:
        """The event, with the trial's forecast noted as the constraint that it missed."""
        self._report()
        point = [(self.spent, loss := self._loss())]
        if self._best is None:
            end, measure = forecast_alone(point, self._start_loss, self.run.config.target.loss), self.spent
        else:
            end, measure = forecast(point, curve_of(self._best)), self._best.value
            why += f" trial {self._best.number}" if why != "its budget is spent" else ""
        self.trial.set_user_attr("forecast", end)
        self.trial.set_constraint("missed", max(1e-6, end / measure - 1))
        return Pruned(f"{self._records[-1].tokens:,} tokens, loss {loss:.2f}: {why}")


def repeat(same: FrozenTrial, trial: Trial) -> float:
    """End a trial as the one of the same settings did, whose run in MLflow is its own too."""
    for key, value in {**same.user_attrs, "same_as": same.number}.items():
        trial.set_user_attr(key, value)
    for key, value in same.constraints.items():
        trial.set_constraint(key, value)
    for tokens, loss in sorted(same.intermediate_values.items()):
        trial.report(loss, tokens)
    if same.state is TrialState.PRUNED:
        raise Pruned(f"the settings of trial {same.number}, which was stopped")
    announce(trial, f"the settings of trial {same.number}, {same.value:,.6g}")
    return float(same.value)


def worker_name(root: Path, pid: int | str) -> str:
    return f"{socket.gethostname()}:{root}:{pid}"


def announce(trial: Trial, what: str) -> None:
    values = ", ".join(f"{key} {value}" for key, value in trial.user_attrs.get("values", {}).items())
    print(f"trial {trial.number}: {what} ({values})", flush=True)


def main() -> None:
    orders = WorkerConfig(**json.loads(sys.stdin.readline()))
    with StopSignals() as stop:
        worker = Worker(orders, stop)
        with naming_dead_storage(worker.sweep):
            worker.work()
        if stop.received is not None:
            sys.exit(128 + stop.received)  # the sweep, which sent it, says the rest


if __name__ == "__main__":
    die_with_parent()
    run_stage(main)
