"""pruner: a curve's forecast along the best one, and an Optuna study that is pruned by it."""

import re
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sweep import pruner
from pipeline.sweep.pruner import ExtrapolationPruner, forecast
from tests.studies import add

# Mean losses of the epochs of the recipe `laptop`'s kind: level first, ever faster at the end.
LOSSES = [10.8, 5.4, 4.1, 3.6, 2.9, 1.9, 0.95, 0.3]
BEST = [(34.0 * i, loss) for i, loss in enumerate(LOSSES)]
END = BEST[-1][0]


@pytest.mark.parametrize("point", BEST)
def test_the_best_curve_itself_ends_where_it_ended(point):
    assert forecast([point], BEST) == pytest.approx(END)


def test_a_loss_between_two_points_is_read_off_between_them():
    assert forecast([(100, 4.75)], BEST) == pytest.approx(100 + END - 51)  # halfway from 34 to 68


def test_only_where_the_curve_is_now_counts():
    assert forecast([(50, 9.0), (100, 4.1)], BEST) == forecast([(100, 4.1)], BEST)


def test_a_curve_lower_than_the_best_one_ended_has_nothing_left():
    assert forecast([(50, 0.2)], BEST) == 50


def test_a_bump_in_the_best_curve_does_not_count():
    bumpy = [(0.0, 10.0), (10.0, 4.0), (20.0, 5.0), (30.0, 1.0)]
    assert forecast([(5, 4.5)], bumpy) == pytest.approx(5 + 30 - 10 * 5.5 / 6)


@given(speed=st.floats(1.0, 3.0), at=st.floats(0.05, 0.95))
def test_what_falls_at_least_as_fast_as_the_best_is_never_seen_behind_it(speed, at):
    assert forecast([(at * END / speed, _loss_at(at * END))], BEST) <= END * (1 + 1e-9)


@given(slowness=st.floats(1.2, 4.0), at=st.floats(0.05, 0.95))
def test_what_is_slower_is_seen_as_far_behind_as_it_is_now(slowness, at):
    behind = at * END * (slowness - 1)
    assert forecast([(at * END * slowness, _loss_at(at * END))], BEST) == pytest.approx(END + behind)


@pytest.fixture
def study():
    return optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.05))


def test_nothing_is_pruned_before_a_trial_has_reached_the_target(study):
    trial = study.ask()
    trial.report(9.9, 10**9)
    assert not trial.should_prune()


@pytest.mark.parametrize(("loss", "pruned"), [(3.0, False), (3.6, False), (3.8, True), (9.0, True)])
def test_a_trial_is_pruned_where_its_forecast_is_too_far_behind_the_best(study, loss, pruned):
    add(study, value=100.0, curve={0: 10.0, 50: 3.0, 100: 0.1})
    trial = study.ask()
    assert not trial.should_prune()  # it has not reported yet
    trial.report(loss, 50)  # the best had 3.6 at 45.7 and 3.8 at 44.3, and the tolerance is 5
    assert trial.should_prune() is pruned


def test_the_example_of_the_documentation_prunes_slow_trials_and_keeps_the_fast(study):
    def objective(trial):
        slowness = trial.suggest_int("slowness", 1, 4)
        for step in range(1, 1000):
            loss = 10.0 - 0.125 * step / slowness
            trial.report(loss, step)
            if loss < 0.1:
                return step
            if trial.should_prune():
                break
        raise optuna.TrialPruned

    for slowness in (2, 4, 1):
        study.enqueue_trial({"slowness": slowness})
    study.optimize(objective, n_trials=3)
    slow, slower, fast = study.trials
    assert [slow.value, fast.value] == [159, 80]
    assert slower.state is optuna.trial.TrialState.PRUNED
    assert max(slower.intermediate_values) < 25


def test_the_pruner_needs_nothing_else_of_this_project():
    assert not re.search("^ *(from|import) (pipeline|torch)", Path(pruner.__file__).read_text(), re.MULTILINE)


def _loss_at(spent):
    """The best curve's loss when it had spent so much."""
    i = min(int(spent / 34), len(BEST) - 2)
    (x, y), (x2, y2) = BEST[i : i + 2]
    return y + (y2 - y) * (spent - x) / (x2 - x)
