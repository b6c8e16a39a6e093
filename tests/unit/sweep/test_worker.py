"""worker: what a trial reports and when it is pruned, step by step, on made-up curves."""

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
from optuna.trial import TrialState

from pipeline.config.sections import TargetConfig
from pipeline.sweep.pruner import curve_of
from pipeline.sweep.worker import TrialReporter, ended_with, requeue_interrupted
from pipeline.system.errors import Pruned
from pipeline.tracking.journal import StepRecord
from tests.studies import add, new_study, sweep_config

BEST = {0: 10.0, 400: 3.0, 800: 0.1}  # tokens and losses of a run that reached the target at 800


class Run:
    """A run whose epochs are 10 steps of 10 tokens, of which every other one is reported."""

    def __init__(self, study, sweep, steps=0):
        target = TargetConfig(
            loss=0.1, rule="corpus", average_steps=100, eval_interval=None, early_stopping_patience=None
        )
        self.config, self.steps_per_epoch = Namespace(target=target), 10
        self.records = []
        for _ in range(steps):
            self.add(5.0)
        self.trial = study.ask()
        self.reporter = TrialReporter(self.trial, self, sweep)

    def add(self, loss, **extra):
        step = len(self.records) + 1
        self.records.append(StepRecord(step, 10 * step, loss, grad_norm=1.0, lr=0.1, train_s=0.5 * step, **extra))

    def step(self, loss, **extra):
        self.add(loss, **extra)
        self.reporter.after_step(self.records[-1])

    @property
    def reported(self):
        return self.trial.study.trials[self.trial.number].intermediate_values


@pytest.fixture
def sweep():
    return sweep_config()


@pytest.fixture
def study(sweep):
    return new_study(sweep)


def test_reports_come_at_fixed_intervals_and_are_means_of_an_epoch(study, sweep):
    run = Run(study, sweep)
    for i in range(1, 31):
        run.step(float(i))
    assert list(run.reported) == list(range(20, 301, 20))
    assert run.reported[300] == pytest.approx(sum(range(21, 31)) / 10)
    assert run.reported[40] == pytest.approx(2.5)  # since the start, where there is no whole epoch yet


@pytest.mark.parametrize(
    ("objective", "spent", "step"), [("tokens", 300, 300), ("steps", 30, 30), ("train_s", 15.0, 15_000)]
)
def test_what_was_spent_is_in_the_objectives_unit_and_so_is_the_curve(objective, spent, step):
    sweep = sweep_config(objective=objective)
    run = Run(study := new_study(sweep), sweep)
    for _ in range(30):
        run.step(5.0)
    assert run.reporter.spent == spent
    assert curve_of(study.trials[0])[-1][0] == step


def test_a_trial_that_falls_like_the_best_continues_until_it_has_spent_as_much(study, sweep):
    add(study, value=800.0, curve=BEST)
    run = Run(study, sweep)
    with pytest.raises(Pruned, match="spent as much as trial 0"):
        for i in range(1, 200):
            ahead = 10 * i + 60  # more than the mean of an epoch lags behind
            run.step(float(np.interp(ahead, list(BEST), list(BEST.values()))))
    assert run.reporter.spent == 800


def test_a_trial_that_learns_nothing_is_pruned_early(study, sweep):
    add(study, value=800.0, curve=BEST)
    run = Run(study, sweep)
    with pytest.raises(Pruned, match="it would end behind trial 0"):
        for _ in range(200):
            run.step(10.0)
    assert run.reporter.spent < 250


def test_a_trial_that_reaches_the_target_is_not_pruned_however_late_it_is():
    sweep = sweep_config(pruner="none")
    add(study := new_study(sweep), value=800.0, curve=BEST)
    run = Run(study, sweep)
    for i in range(1, 101):
        run.step(5.0, **({"corpus_loss": 0.09} if i == 100 else {}))
    run.reporter.require_target()
    assert run.reporter.spent == 1000


def test_a_run_that_ends_short_of_the_target_is_pruned_and_its_end_is_reported(study, sweep):
    run = Run(study, sweep)
    for _ in range(21):
        run.step(1.0)
    with pytest.raises(Pruned, match=r"its budget is spent$"):
        run.reporter.require_target()
    assert list(run.reported)[-1] == 210


def test_steps_of_an_interrupted_attempt_are_reported_again(study, sweep):
    run = Run(study, sweep, steps=13)
    run.reporter.report_past_steps()
    run.step(5.0)
    assert list(run.reported) == list(range(20, 141, 20))


def test_a_better_trial_that_ended_meanwhile_is_the_one_to_beat(study, sweep):
    run = Run(study, sweep)
    for _ in range(40):
        run.step(3.0)
    add(study, value=400.0, curve={0: 10.0, 400: 0.1})
    with pytest.raises(Pruned):
        for _ in range(4):
            run.step(3.0)


def test_settings_that_were_tried_are_found(study):
    add(study, value=800.0, values={"optim.lr": 0.1})
    add(study, TrialState.PRUNED, values={"optim.lr": 0.2})
    add(study, TrialState.FAIL, values={"optim.lr": 0.3})
    assert [ended_with({"optim.lr": lr}, study) for lr in (0.1, 0.2, 0.3)] == [*study.trials[:2], None]


def test_an_interrupted_trial_is_requeued_and_one_that_failed_is_not(study):
    add(study, TrialState.FAIL, reason="DivergedError: loss is not finite")
    add(study, TrialState.FAIL)
    for trial in study.trials:
        requeue_interrupted(study, trial)
    assert [trial.system_attrs.get("failed_trial") for trial in study.trials[2:]] == [1]
