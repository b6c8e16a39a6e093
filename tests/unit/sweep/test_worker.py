"""The reports of a trial, and when it is pruned, on made-up curves."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from optuna import TrialPruned
from optuna.trial import TrialState

from pipeline.config.sections import TargetConfig
from pipeline.sweep import worker
from pipeline.sweep.pruner import curve_of
from pipeline.sweep.study import VALUES, suggest
from pipeline.sweep.worker import TrialReporter, Worker, WorkerConfig, ended_with, requeue_interrupted
from pipeline.system.device import gpu_ids, use_gpu
from pipeline.system.errors import Pruned, RunLocked
from pipeline.tracking.journal import StepRecord
from tests.studies import add, new_study, sweep_config

BEST = {0: 10.0, 400: 3.0, 800: 0.1}  # tokens and losses of a run that reached the target at 800
TARGET = TargetConfig(loss=0.1, rule="corpus", average_steps=100, eval_interval=None, early_stopping_patience=None)


class Run:
    """A run with epochs of 10 steps of 10 tokens; every other step is reported."""

    def __init__(self, study, sweep, losses=(), target=TARGET):
        self.config, self.steps_per_epoch, self.records = Namespace(target=target), 10, []
        for loss in losses:
            self.add(loss)
        self.trial = study.ask()
        self.reporter = TrialReporter(self.trial, self, sweep)

    def add(self, loss, **extra):
        step = len(self.records) + 1
        self.records.append(StepRecord(step, 10 * step, loss, grad_norm=1.0, lr=0.1, train_s=0.5 * step, **extra))

    def take_steps(self, losses):
        for loss in losses:
            self.add(loss)
            self.reporter.after_step(self.records[-1])

    @property
    def reports(self):
        return self.trial.study.trials[self.trial.number].intermediate_values


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worker"])  # those of pytest are not a worker's


def test_reports_have_fixed_intervals_and_are_means_of_an_epoch(study, sweep):
    run = Run(study, sweep)
    run.take_steps(map(float, range(1, 31)))
    assert list(run.reports) == list(range(20, 301, 20))
    assert run.reports[300] == pytest.approx(sum(range(21, 31)) / 10)
    assert run.reports[40] == pytest.approx(2.5)  # since the start, in the first epoch


@pytest.mark.parametrize(
    ("objective", "spent", "step"), [("tokens", 300, 300), ("steps", 30, 30), ("train_s", 15.0, 15_000)]
)
def test_spent_and_reports_are_in_the_unit_of_the_objective(objective, spent, step):
    sweep = sweep_config(objective=objective)
    run = Run(study := new_study(sweep), sweep)
    run.take_steps([5.0] * 30)
    assert run.reporter.spent == spent
    assert curve_of(study.trials[0])[-1][0] == step


HELD_OUT = TARGET.updated(rule="validation", loss=2.0)


def take_evaluated_steps(run, held_out):
    """Twenty steps, whose minibatch loss is far from the target; `held_out`: validation loss by step."""
    for step in range(1, 21):
        run.add(9.0, **({"validation_loss": held_out[step]} if step in held_out else {}))
        run.reporter.after_step(run.records[-1])


@pytest.mark.parametrize(("objective", "spent"), [("tokens", 200), ("train_s", 10.0)])
def test_a_held_out_target_is_reported_at_each_evaluation_and_decides_what_was_spent(objective, spent):
    sweep = sweep_config(objective=objective)
    run = Run(study := new_study(sweep), sweep, target=HELD_OUT)
    take_evaluated_steps(run, {5: 3.0, 10: 2.5, 20: 1.99})
    run.reporter.require_target()
    assert run.reporter.spent == spent
    assert [loss for _, loss in curve_of(study.trials[0])] == [3.0, 2.5, 1.99]


def test_a_held_out_loss_that_falls_as_fast_as_the_best_is_not_pruned_and_one_that_rises_is(study, sweep):
    add(study, value=200.0, curve={50: 3.0, 100: 2.5, 200: 1.99})
    take_evaluated_steps(Run(study, sweep, target=HELD_OUT), {5: 2.9, 10: 2.4, 20: 1.99})
    run = Run(study, sweep, target=HELD_OUT)
    with pytest.raises(Pruned, match=r"100 tokens, loss 3\.10: its forecast is behind trial 0"):
        take_evaluated_steps(run, {5: 2.9, 10: 3.1})
    late = Run(study, sweep, target=HELD_OUT)
    with pytest.raises(Pruned, match="200 tokens, loss inf: it has spent as much as trial 0"):
        take_evaluated_steps(late, {})


AHEAD = 60  # tokens: more than the mean of an epoch lags behind
LIKE_THE_BEST = [float(np.interp(10 * i + AHEAD, *zip(*BEST.items(), strict=True))) for i in range(1, 200)]


@pytest.mark.parametrize(
    ("losses", "why", "spent"),
    [(LIKE_THE_BEST, "spent as much as trial 0", 800), ([10.0] * 200, "its forecast is behind trial 0", 40)],
)
def test_a_trial_that_cannot_beat_the_best_is_pruned(study, sweep, losses, why, spent):
    add(study, value=800.0, curve=BEST)
    run = Run(study, sweep)
    with pytest.raises(Pruned, match=why):
        run.take_steps(losses)
    assert run.reporter.spent == spent  # a loss of 10 forecasts 800 more, which the tolerance of 5% allows up to 40


def test_without_a_pruner_a_trial_reaches_the_target_however_late():
    sweep = sweep_config(pruner="none")
    add(study := new_study(sweep), value=800.0, curve=BEST)
    run = Run(study, sweep)
    run.take_steps([5.0] * 99)
    run.add(5.0, corpus_loss=0.09)
    run.reporter.after_step(run.records[-1])
    run.reporter.require_target()
    assert run.reporter.spent == 1000


def test_a_trial_that_reaches_the_target_exactly_as_late_as_the_best_is_not_pruned(study, sweep):
    add(study, value=800.0, curve=BEST)
    run = Run(study, sweep)
    run.take_steps(LIKE_THE_BEST[:79])
    run.add(0.1, corpus_loss=0.09)
    run.reporter.after_step(run.records[-1])
    assert run.reporter.spent == 800


def test_a_run_that_ends_above_the_target_is_pruned_and_its_end_is_reported(study, sweep):
    run = Run(study, sweep)
    run.take_steps([1.0] * 21)
    with pytest.raises(Pruned, match=r"its budget is used up$"):
        run.reporter.require_target()
    assert list(run.reports)[-1] == 210


def test_the_steps_of_an_interrupted_attempt_are_reported_again(study, sweep):
    run = Run(study, sweep, losses=[5.0] * 13)
    run.reporter.report_past_steps()
    run.take_steps([5.0])
    assert list(run.reports) == list(range(20, 141, 20))


def test_the_best_trial_may_have_ended_after_this_one_started(study, sweep):
    run = Run(study, sweep)
    run.take_steps([3.0] * 40)
    add(study, value=400.0, curve={0: 10.0, 400: 0.1})
    with pytest.raises(Pruned):
        run.take_steps([3.0] * 4)


def test_settings_that_were_tried_are_found(study):
    add(study, value=800.0, values={"optim.lr": 0.1})
    add(study, TrialState.PRUNED, values={"optim.lr": 0.2})
    add(study, TrialState.FAIL, values={"optim.lr": 0.3})
    assert [ended_with({"optim.lr": lr}, study) for lr in (0.1, 0.2, 0.3)] == [*study.trials[:2], None]
    add(study, value=900.0, values={"optim.lr": 0.2})
    assert ended_with({"optim.lr": 0.2}, study).value == 900  # the pruned one had the values of this one


def test_a_trial_with_the_values_of_a_running_one_is_pruned_and_no_failure(monkeypatch):
    study = new_study(sweep := sweep_config(space={"optim": {"lr": [0.1]}}))
    for name in ("read_config", "with_values", "prepare_machine", "count_tokens", "read_data"):
        monkeypatch.setattr(worker, name, MagicMock())
    monkeypatch.setattr(worker, "open_run", MagicMock(side_effect=RunLocked("it is held by process 7")))
    second = object.__new__(Worker)
    second.study, second.sweep, second.root, second.params, second.name = study, sweep, Path(), None, ""
    with pytest.raises(RunLocked):  # by a process that is no worker of this study
        second._value(study.ask())
    study.tell(0, state=TrialState.FAIL)
    (running := study.ask()).set_user_attr(VALUES, suggest(running, sweep))
    with pytest.raises(TrialPruned, match="same values as trial 1, which is running"):
        second._value(study.ask())
    assert ["reason" in trial.user_attrs for trial in study.trials] == [True, False, False]


def test_an_interrupted_trial_is_requeued_and_a_failed_one_is_not(study):
    add(study, TrialState.FAIL, reason="DivergedError: loss is not finite")
    add(study, TrialState.FAIL)
    for trial in study.trials:
        requeue_interrupted(study, trial)
    assert [trial.system_attrs.get("failed_trial") for trial in study.trials[2:]] == [1]


def test_a_worker_whose_sweep_died_before_it_could_notice_opens_nothing(monkeypatch):
    config = WorkerConfig("", {}, {}, {}, sweep_id="", threads=1, parent_run_id="", sweep_pid=0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(config._asdict())))
    worker.main()  # with `sweep={}` it would fail


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("3, GPU-8f2a", 2, ["3", "GPU-8f2a"]),
        ("2,-1", 1, ["2"]),
        ("", 0, []),
        ("MIG-1a,MIG-2b", 1, ["MIG-1a", "MIG-2b"]),  # parts of a GPU, of which CUDA counts the first
    ],
)
@pytest.mark.parametrize(("hip", "variable"), [(None, "CUDA_VISIBLE_DEVICES"), ("6.4", "HIP_VISIBLE_DEVICES")])
def test_a_worker_sees_only_its_gpu(hip, variable, visible, count, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: max(1, count))  # it also counts where the driver is too old
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv(variable, visible)
    assert gpu_ids() == expected
    seen = []
    monkeypatch.setattr(Worker, "__init__", lambda *_: seen.append(os.environ.get(variable)))
    monkeypatch.setattr(Worker, "sweep", sweep_config(), raising=False)
    monkeypatch.setattr(Worker, "work", lambda _: None)
    for gpu in expected or [None]:
        config = WorkerConfig("", {}, {}, {}, "", 1, "", os.getppid(), gpu)
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(config._asdict()) + "\n"))
        worker.main()
    assert seen == (expected or [visible])


def test_a_gpu_is_chosen_among_those_that_rocr_visible_devices_leaves(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "4,6")  # as Slurm sets it; HIP numbers what is left from 0
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert gpu_ids() == ["0", "1"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")  # restored after the test
    use_gpu(gpu_ids()[1])
    assert (os.environ["ROCR_VISIBLE_DEVICES"], os.environ["HIP_VISIBLE_DEVICES"]) == ("4,6", "1")
