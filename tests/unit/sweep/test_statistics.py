"""Mean and spread, Welch's test against values computed by hand, the rank of groups, and the verdict."""

import math
from types import SimpleNamespace as Namespace

import pytest
from optuna.trial import TrialState

from pipeline.sweep.statistics import SeedGroup, Spread, rank, verdict, welch_p
from pipeline.sweep.worker import SPENT


def group(name, *costs):
    """A group by the tokens of its seeds; None: the seed missed the target."""
    states = [TrialState.PRUNED if cost is None else TrialState.COMPLETE for cost in costs]
    trials = [
        Namespace(state=state, user_attrs={SPENT: {"tokens": cost}}) for state, cost in zip(states, costs, strict=True)
    ]
    return SeedGroup(name, {}, trials)


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([2, 4, 4, 4, 5, 5, 7, 9], (5, math.sqrt(32 / 7), 2, 9)),  # squared deviations from 5: 9+1+1+1+0+0+4+16
        ([3.5, 4.5], (4, math.sqrt(0.5), 3.5, 4.5)),
        ([7], (7, None, 7, 7)),
    ],
)
def test_the_spread_is_that_of_a_sample_and_a_single_value_has_no_deviation(values, spread):
    assert Spread.of(values) == pytest.approx(spread)


def p_of_4_degrees(t):
    """Two-sided p-value of Student's t with 4 degrees of freedom, in closed form."""
    u = t**2 / (1 + t**2 / 4)
    return 1 - 2 * 3 / 8 * math.sqrt(u) * (1 - u / 12)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        # means 2 and 5, variances 1 and 1: t = 3 / sqrt(2/3), with 4 degrees of freedom
        ([1, 2, 3], [4, 5, 6], p_of_4_degrees(3 / math.sqrt(2 / 3))),
        # means 3 and 6, variances 2.5 and 10: t = 3 / sqrt(2.5), with 2.5**2 / (.5**2 / 4 + 2**2 / 4) = 5.88 degrees
        ([1, 2, 3, 4, 5], [2, 4, 6, 8, 10], 0.10753),  # from a table of Student's t: .1 at 1.955, .2 at 1.446
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([5, 5], [5, 7], 0.5),  # one degree: p = 1 - 2 atan(1) / pi
        ([1], [2, 3], None),
        ([], [2, 3], None),
        ([4, 4], [6, 6], None),  # no variance
    ],
)
def test_welchs_p_value_has_the_value_computed_by_hand(first, second, p):
    assert welch_p(first, second) == (None if p is None else pytest.approx(p, abs=2e-5))


def test_groups_are_ranked_by_missed_seeds_and_then_by_mean():
    given = [
        group("none yet"),
        group("never", None, None),
        group("cheap but once missed", 10, None),
        group("b", 30, 50),
        group("a", 20, 59),
    ]
    assert [each.name for each in rank(given, "tokens")] == ["a", "b", *[each.name for each in given[2::-1]]]


DEFAULT = group("default", 100, 102, 104)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        # t = 12 / sqrt(4/3 + 4/3) = 7.35 with 4 degrees: p = .0018; twice that for the better of two
        ([group("trial 7", 88, 90, 92), group("trial 8", 89, 91, 93)],
         "winner: trial 7, 90 tokens on average, 11.8% fewer than the default; Welch's p 0.0018, 0.0037 for the best "
         "of 2: better than the default at p < 0.05"),
        ([group("trial 7", 93, 97, 101)],  # t = 5 / sqrt(16/3 + 4/3) = 1.94
         "4.9% fewer than the default; Welch's p 0.1"),
        # t = 5 / sqrt(4/3 + 1/3) = 3.87 with 2.9 degrees: p = .031 alone, .063 for the best of two
        ([group("trial 7", 96, 97, 98), group("trial 8", 97, 98, 99)],
         "of 2: not better than the default at p < 0.05"),
        ([group("trial 7", 103, 105, 107)], "no trial ranks above it"),
        ([group("trial 7", 90, 92, None)],
         "winner: default (the values of params.yaml); no trial ranks above it; lower means, but with missed seeds: "
         "trial 7, 1 of 3 seeds missed the target"),
        ([group("trial 7", 90)], "no p-value: it needs two seeds of each"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_winner_and_whether_it_is_better_than_the_default(others, said):
    text = verdict(rank([DEFAULT, *others], "tokens"), DEFAULT, "tokens", "tokens")
    assert said in text
    assert "\n" not in text
    assert ("missed" in text) == ("missed" in said)


def test_the_verdict_states_missed_seeds_of_winner_and_default():
    default, winner = group("default", None, None, 100), group("trial 7", 120, 130, None)
    text = verdict(rank([default, winner], "tokens"), default, "tokens", "tokens")
    assert text == (
        "winner: trial 7, 125 tokens on average (1 of 3 seeds missed the target); the default reached the target with "
        "1 of 3 seeds, 25.0% more than the default; no p-value: it needs two seeds of each that reached the target, "
        "and costs that differ"
    )
