"""worker: a trial against the best one, step by step, on curves that are made up."""

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from test_study import add, question, sweep_config

from pipeline.config.sections import TargetConfig
from pipeline.sweep.study import curve_of, ended_with, join_study
from pipeline.sweep.worker import Race, repeat
from pipeline.system.errors import Pruned

BEST = {0: 10.0, 400: 3.0, 800: 0.1}  # tokens and losses of a run that reached the target at 800


def race_of(study, sweep, rows=()):
    """A trial's race; a pass has 100 tokens, which are four rungs of 25, and a step 10."""
    target = TargetConfig(loss=0.1, rule="corpus", average_steps=100, eval_interval=None, early_stopping_patience=None)
    config = Namespace(model=Namespace(vocab_size=50257), target=target)
    run = Namespace(text=Namespace(train=Namespace(size=100)), config=config, steps_per_epoch=10, rows=list(rows))
    run.journal = Namespace(times=[{"train_s": 0.5 * row["step"]} for row in rows])
    trial = study.ask()
    return Race(trial, run, sweep), trial, run


def step(i, loss, **extra):
    return {"step": i, "tokens": 10 * i, "loss": loss, **extra}, {"train_s": 0.5 * i}


def frozen(study, trial):
    return study.trials[trial.number]


@pytest.fixture
def sweep():
    return sweep_config()


@pytest.fixture
def study(sweep):
    return join_study(sweep, question(sweep), InMemoryStorage())


def test_reports_come_at_the_first_step_of_each_rung_and_are_means_of_a_pass(study, sweep):
    race, trial, _ = race_of(study, sweep)
    for i in range(1, 31):
        race.after_step(*step(i, float(i)))
    reported = frozen(study, trial).intermediate_values
    assert list(reported) == [30, 50, 80, 100, 130, 150, 180, 200, 230, 250, 280, 300]
    assert reported[300] == pytest.approx(sum(range(21, 31)) / 10)
    assert reported[30] == pytest.approx(2)  # since the start, where there is no whole pass yet


@pytest.mark.parametrize(("objective", "spent"), [("tokens", 300), ("steps", 30), ("train_s", 15.0)])
def test_what_was_spent_is_in_the_objectives_unit_and_so_is_the_curve(objective, spent):
    sweep = sweep_config(objective=objective)
    study = join_study(sweep, question(sweep), InMemoryStorage())
    race, trial, _ = race_of(study, sweep)
    for i in range(1, 31):
        race.after_step(*step(i, 5.0))
    assert race.spent == spent
    assert curve_of(frozen(study, trial))[-1][0] == pytest.approx(spent)


def test_a_trial_that_falls_like_the_best_goes_on_until_it_has_spent_as_much(study, sweep):
    add(study, value=800.0, curve=BEST)
    race, trial, _ = race_of(study, sweep)
    with pytest.raises(Pruned, match="spent as much as trial 0"):
        for i in range(1, 200):
            ahead = 10 * i + 60  # more than the mean of a pass lags behind
            race.after_step(*step(i, float(np.interp(ahead, list(BEST), list(BEST.values())))))
    assert race.spent == 800
    assert frozen(study, trial).system_attrs["constraints:missed"] > 0


def test_a_trial_that_learns_nothing_is_given_up_early(study, sweep):
    add(study, value=800.0, curve=BEST)
    race, trial, _ = race_of(study, sweep)
    with pytest.raises(Pruned, match="it would end behind trial 0"):
        for i in range(1, 200):
            race.after_step(*step(i, 10.0))
    assert race.spent < 250
    assert frozen(study, trial).user_attrs["forecast"] == pytest.approx(800 + race.spent)


def test_a_trial_that_reaches_the_target_is_not_pruned_however_late_it_is():
    sweep = sweep_config(pruner="none")
    study = join_study(sweep, question(sweep), InMemoryStorage())
    add(study, value=800.0, curve=BEST)
    race, *_ = race_of(study, sweep)
    for i in range(1, 101):
        race.after_step(*step(i, 5.0, **({"corpus_loss": 0.09} if i == 100 else {})))
    race.require_target()
    assert race.spent == 1000


def test_a_run_that_ends_short_of_the_target_is_pruned_with_a_forecast_of_its_own(study, sweep):
    race, trial, _ = race_of(study, sweep)
    for i in range(1, 21):
        race.after_step(*step(i, 1.0))
    with pytest.raises(Pruned, match="its budget is spent"):
        race.require_target()
    assert frozen(study, trial).user_attrs["forecast"] > 200
    assert list(frozen(study, trial).intermediate_values)[-1] == 200


def test_what_an_earlier_attempt_took_is_reported_again(study, sweep):
    rows = [step(i, 5.0)[0] for i in range(1, 13)]
    race, trial, run = race_of(study, sweep, rows)
    race.go_on_from(run)
    race.after_step(*step(13, 5.0))
    assert list(frozen(study, trial).intermediate_values) == [30, 50, 80, 100, 130]


def test_a_better_trial_that_ended_meanwhile_is_the_one_to_beat(study, sweep):
    race, _, _ = race_of(study, sweep)
    for i in range(1, 41):
        race.after_step(*step(i, 3.0))
    add(study, value=400.0, curve={0: 10.0, 400: 0.1})
    with pytest.raises(Pruned):
        for i in range(41, 45):
            race.after_step(*step(i, 3.0))


def test_settings_that_were_tried_are_not_trained_again(study, sweep):
    add(study, value=800.0, curve=BEST, values={"optim.lr": 0.1})
    add(study, TrialState.PRUNED, curve={25: 9.0, 50: 8.0}, missed=0.4, values={"optim.lr": 0.2})
    assert ended_with({"optim.lr": 0.3}, study) is None
    again = study.ask()
    assert repeat(ended_with({"optim.lr": 0.1}, study), again) == 800.0
    assert frozen(study, again).user_attrs["same_as"] == 0
    assert frozen(study, again).intermediate_values == BEST
    again = study.ask()
    with pytest.raises(Pruned, match="the settings of trial 1"):
        repeat(ended_with({"optim.lr": 0.2}, study), again)
    assert frozen(study, again).constraints == {"missed": 0.4}
    assert frozen(study, again).intermediate_values == {25: 9.0, 50: 8.0}
