"""Choose the values of a trial from a random seed of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial


class SamplerPerTrial(BaseSampler):  # type: ignore[misc]
    """Uses a new sampler for each trial, whose seed follows from the study's seed and the trial's number.

    A trial's number is unique in the study, so workers do not draw the same values, also on other machines. A study of
    one worker that is not interrupted can be repeated: the same seed gives the same values.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        """`make` creates a sampler from a seed, a whole number below 2^32."""
        self._make, self._seed = make, seed
        self.sampler = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.sampler = self._make(int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]))
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.sampler.infer_relative_search_space(study, trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return dict(self.sampler.sample_relative(study, trial, search_space))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)
