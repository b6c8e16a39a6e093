"""extrapolation: a curve read off against the best one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sweep.pruner import forecast, forecast_alone

# Mean losses of the passes of the recipe `laptop`'s kind: level first, ever faster at the end.
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


def test_without_another_run_the_logarithm_goes_on_as_it_fell():
    assert forecast_alone([(100, math.sqrt(10 * 0.1))], start_loss=10, target=0.1) == pytest.approx(200)
    assert forecast_alone([(100, 0.05)], start_loss=10, target=0.1) == 100
    assert forecast_alone([(100, 11.0)], start_loss=10, target=0.1) > 100_000  # it has not learnt anything


def _loss_at(spent):
    """The best curve's loss when it had spent so much."""
    i = min(int(spent / 34), len(BEST) - 2)
    (x, y), (x2, y2) = BEST[i : i + 2]
    return y + (y2 - y) * (spent - x) / (x2 - x)
