"""extrapolation: a curve read off against the best one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extrapolation import earliest_end, straight_end

# Mean losses of the passes of the recipe `laptop`'s kind: level first, ever faster at the end.
LOSSES = [10.8, 5.4, 4.1, 3.6, 2.9, 1.9, 0.95, 0.3]
BEST = [(34.0 * i, loss) for i, loss in enumerate(LOSSES)]
END = BEST[-1][0]


@pytest.mark.parametrize("point", BEST)
def test_the_best_curve_itself_ends_where_it_ended(point):
    assert earliest_end([point], BEST, optimism=1) == pytest.approx(END)


def test_a_loss_between_two_points_is_read_off_between_them():
    assert earliest_end([(100, 4.75)], BEST, optimism=1) == pytest.approx(100 + END - 51)  # halfway from 34 to 68


def test_optimism_divides_what_is_left_and_nothing_else():
    plain, trusting = (earliest_end([(100, 4.1)], BEST, optimism) for optimism in (1, 2))
    assert plain - 100 == pytest.approx(2 * (trusting - 100))


def test_a_curve_lower_than_the_best_one_ended_has_nothing_left():
    assert earliest_end([(50, 0.2)], BEST, optimism=1) == 50


def test_a_bump_in_the_best_curve_does_not_count():
    bumpy = [(0.0, 10.0), (10.0, 4.0), (20.0, 5.0), (30.0, 1.0)]
    assert earliest_end([(5, 4.5)], bumpy, optimism=1) == pytest.approx(5 + 30 - 10 * 5.5 / 6)


@given(speed=st.floats(1.0, 3.0), at=st.floats(0.05, 0.95), optimism=st.floats(1.0, 2.0))
def test_what_falls_at_least_as_fast_as_the_best_is_never_given_up(speed, at, optimism):
    spent = at * END
    loss = _interpolated(spent)
    assert earliest_end([(spent / speed, loss)], BEST, optimism) <= END * (1 + 1e-9)


@given(slowness=st.floats(1.6, 4.0))
def test_what_is_much_slower_is_given_up_before_it_has_spent_as_much(slowness):
    given_up = next(
        spent for spent in range(1, int(END) + 1)
        if earliest_end([(float(spent), _interpolated(spent / slowness))], BEST, optimism=1.25) >= END
    )  # fmt: skip
    assert given_up < 0.7 * END


def test_without_another_run_the_logarithm_goes_on_as_it_fell():
    assert straight_end([(100, math.sqrt(10 * 0.1))], start_loss=10, target=0.1) == pytest.approx(200)
    assert straight_end([(100, 0.05)], start_loss=10, target=0.1) == 100
    assert straight_end([(100, 11.0)], start_loss=10, target=0.1) > 100_000  # it has not learnt anything


def _interpolated(spent):
    """The best curve's loss when it had spent so much."""
    i = min(int(spent / 34), len(BEST) - 2)
    (x, y), (x2, y2) = BEST[i : i + 2]
    return y + (y2 - y) * (spent - x) / (x2 - x)
