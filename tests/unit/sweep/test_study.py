"""study: shared settings, whose turn it is, retries and samplers, in memory."""

import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from pipeline.sweep.pruner import best_trial
from pipeline.sweep.study import MAX_RETRIES, enqueue, has_work, join_study, latest_trials, requeue, suggest
from pipeline.system.errors import InputError
from tests.studies import add, new_study, shared_by, sweep_config


@pytest.fixture
def sweep():
    return sweep_config()


@pytest.fixture
def study(sweep):
    return new_study(sweep)


@pytest.mark.parametrize(
    ("changes", "sweep_changes", "named"),
    [
        ({"optim.max_grad_norm": 2.0}, {}, "optim.max_grad_norm 1.0 -> 2.0"),
        ({"target.loss": 0.2}, {}, "target.loss 0.1 -> 0.2"),
        ({}, {"objective": "steps"}, "objective tokens -> steps"),
        ({}, {"space": {"optim": {"lr": {"low": 0.001, "high": 0.2, "log": True}}}}, "space.optim.lr.high 0.1 -> 0.2"),
    ],
)
def test_a_study_with_other_shared_settings_is_not_joined(study, changes, sweep_changes, named):  # D5
    other = sweep_config(**sweep_changes)
    with pytest.raises(InputError) as error:
        join_study(other, shared_by(other, **changes), study._storage)
    assert named in str(error.value)
    assert "--study" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_of_other_data_is_not_joined(study, sweep):
    with pytest.raises(InputError, match=r"data_sha256 d+ -> eee"):
        join_study(sweep, {**shared_by(sweep), "data_sha256": "eee"}, study._storage)


def test_what_is_searched_and_how_the_cores_are_divided_is_not_shared(study, sweep):
    join_study(sweep, shared_by(sweep, **{"optim.lr": 0.02, "train.threads": 1}), study._storage)


def test_the_micro_batch_is_shared_and_the_batch_is_not_where_step_tokens_are_searched(sweep):
    space = {"windows": {"step_tokens": [2048, 4096]}}
    by_tokens = sweep_config(space=space)
    assert shared_by(by_tokens) == shared_by(by_tokens, **{"windows.micro_batch_size": 3})
    assert shared_by(by_tokens) != shared_by(sweep_config(space=space, micro_batch_tokens=1024))
    assert shared_by(sweep) == shared_by(sweep_config(micro_batch_tokens=1024))


def test_a_study_has_work_until_its_trials_are_begun_and_a_retry_is_not_one_more(study, sweep):
    for _ in range(sweep.trials):
        assert has_work(study, sweep)
        suggest(study.ask(), sweep)
    assert not has_work(study, sweep)
    requeue(study, study.trials[1])
    assert has_work(study, sweep)
    study.ask()
    assert not has_work(study, sweep)


def test_a_requeued_trial_has_the_same_values(study, sweep):
    values = suggest(study.ask(), sweep)
    requeue(study, study.trials[0])
    assert suggest(study.ask(), sweep) == values
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.RUNNING]
    assert [trial.number for trial in latest_trials(study)] == [1]


def test_a_suggestion_has_three_digits_and_a_choice_may_be_a_list():
    space = {"optim": {"lr": {"low": 0.00483726152, "high": 0.0048372616}, "betas": [[0.9, 0.95]]}}
    sweep = sweep_config(space=space)
    assert suggest(new_study(sweep).ask(), sweep) == {"optim.lr": 0.00484, "optim.betas": [0.9, 0.95]}


def test_what_kills_every_worker_is_given_up_in_the_end(study):
    study.ask()
    for number in range(MAX_RETRIES):
        requeue(study, study.trials[number], MAX_RETRIES)
        assert study.ask().number == number + 1
    requeue(study, study.trials[MAX_RETRIES], MAX_RETRIES)
    assert len(study.trials) == MAX_RETRIES + 1


def test_patience_ends_a_study_that_finds_nothing_better(study):
    sweep = sweep_config(patience=2, trials=100)
    add(study, TrialState.PRUNED)
    add(study, value=5.0)
    add(study, value=6.0)
    assert has_work(study, sweep)
    add(study, TrialState.PRUNED)
    assert not has_work(study, sweep)


def test_own_values_are_tried_first_and_only_where_the_space_contains_them(study, sweep):
    assert not enqueue(study, sweep, {"optim.lr": 0.5})
    assert enqueue(study, sweep, {"optim.lr": 0.02})
    assert suggest(study.ask(), sweep) == {"optim.lr": 0.02}


@pytest.mark.parametrize(("kind", "sampler"), [("tpe", TPESampler), ("random", RandomSampler)])
def test_the_sampler_is_the_configured_one_and_repeats_itself(kind, sampler):
    sweep = sweep_config(sampler=kind)
    found = []
    for _ in range(2):
        study = new_study(sweep)
        assert isinstance(study.sampler, sampler)
        found.append([suggest(study.ask(), sweep)["optim.lr"] for _ in range(3)])
    assert found[0] == found[1]
    other = new_study(sweep, worker=1)
    assert suggest(other.ask(), sweep)["optim.lr"] != found[0][0]


def test_the_best_is_the_cheapest_of_those_that_reached_the_target(study):
    assert best_trial(study) is None
    add(study, TrialState.PRUNED, curve={10: 0.1})
    for value in (7.0, 6.0, 6.0):
        add(study, value=value)
    assert best_trial(study).number == 2


@pytest.mark.parametrize(("pruner", "pruned"), [("extrapolation", True), ("none", False)])
def test_a_study_has_the_configured_pruner(pruner, pruned):
    study = new_study(sweep_config(pruner=pruner))
    add(study, value=100.0, curve={0: 10.0, 100: 0.1})
    trial = study.ask()
    trial.report(9.0, 99)
    assert trial.should_prune() is pruned
