"""Compare runs that differ in their seed: mean and spread of what they spent, their rank, and Welch's test."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from pipeline.sweep.worker import SPENT

ALPHA = 0.05


class Spread(NamedTuple):
    """Mean, standard deviation of the sample (None for a single value), minimum and maximum."""

    mean: float
    sd: float | None
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values))


class SeedGroup(NamedTuple):
    """Runs with the same parameters and several seeds."""

    name: str
    values: dict[str, Any]  # by dotted key, without the seed
    trials: list[FrozenTrial]  # that have ended, one for each seed

    @property
    def n_missed(self) -> int:
        return sum(trial.state is not TrialState.COMPLETE for trial in self.trials)

    def costs(self, objective: str) -> list[float]:
        """What each seed that reached the target has spent: tokens, steps or train_s."""
        return [trial.user_attrs[SPENT][objective] for trial in self.trials if trial.state is TrialState.COMPLETE]


def rank(groups: Sequence[SeedGroup], objective: str) -> list[SeedGroup]:
    """The groups by the share of seeds that missed the target, then by mean cost; those without a run are last."""

    def key(group: SeedGroup) -> tuple[float, float]:
        if not group.trials:
            return (2.0, 0.0)
        costs = group.costs(objective)
        return (group.n_missed / len(group.trials), fmean(costs) if costs else 0.0)

    return sorted(groups, key=key)


def welch_p(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's test that two samples have equal means.

    None where it is not defined: a sample of fewer than two values, or two samples without variance.
    """
    from scipy.stats import ttest_ind_from_stats

    if min(len(first), len(second)) < 2 or not stdev(first) + stdev(second):
        return None
    given = [number for values in (first, second) for number in (fmean(values), stdev(values), len(values))]
    return float(ttest_ind_from_stats(*given, equal_var=False).pvalue)


def verdict(ranked: Sequence[SeedGroup], default: SeedGroup, objective: str, unit: str) -> str:
    """One line: the winner, and whether it is better than the default.

    The winner was chosen among several trials by the same runs, so its p-value is multiplied by their number
    (Bonferroni).
    """
    winner, n_trials, base = ranked[0], len(ranked) - 1, default.costs(objective)
    if winner is default:
        cheaper = [each for each in ranked[1:] if (own := each.costs(objective)) and fmean(own) < fmean(base)]
        missed = [f"{each.name}, {each.n_missed} of {len(each.trials)} seeds missed the target" for each in cheaper]
        lower = f"; lower means, but with missed seeds: {'; '.join(missed)}" if missed else ""
        return f"winner: default (the values of params.yaml); no trial ranks above it{lower}"
    costs = winner.costs(objective)
    text = f"winner: {winner.name}, {fmean(costs):,.6g} {unit} on average"
    if winner.n_missed:
        text += f" ({winner.n_missed} of {len(winner.trials)} seeds missed the target)"
    if default.n_missed:
        n_reached = len(default.trials) - default.n_missed
        text += f"; the default reached the target with {n_reached} of {len(default.trials)} seeds"
    if base:
        change = fmean(costs) / fmean(base) - 1
        text += f", {abs(change):.1%} {'fewer' if change < 0 else 'more'} than the default"
    if (p := welch_p(costs, base)) is None:
        return f"{text}; no p-value: it needs two seeds of each that reached the target, and costs that differ"
    corrected = min(1.0, n_trials * p)
    is_better = corrected < ALPHA and fmean(costs) < fmean(base)
    chosen = f", {corrected:.2g} for the best of {n_trials}" if n_trials > 1 else ""
    return f"{text}; Welch's p {p:.2g}{chosen}: {'' if is_better else 'not '}better than the default at p < {ALPHA:g}"
