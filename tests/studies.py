"""Build studies, and trials that ended in a given way, for the tests of the sweep."""

from pathlib import Path

from optuna.distributions import FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from pipeline.config.params import load_params
from pipeline.config.sections import SweepConfig
from pipeline.sweep.search_space import overridden
from pipeline.sweep.study import join_study, shared_settings
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[1]
SPACE = {"optim": {"lr": {"low": 0.001, "high": 0.1, "log": True}}}


def sweep_config(**changes):
    given = {"study": "s", "space": SPACE, "trials": 4, "sampler": "random", "pruner_tolerance": 0.05, **changes}
    return overridden(load_params(ROOT / "params.yaml"), given).section(SweepConfig)


def shared_by(sweep, **changes):
    params = load_params(ROOT / "params.yaml")
    for key, value in changes.items():
        section, name = key.split(".")
        params.values[section][name] = value
    return shared_settings(sweep, RunConfig.of(params), "d" * 64)


def new_study(sweep, **arguments):
    return join_study(sweep, shared_by(sweep), InMemoryStorage(), **arguments)


def add(study, state=TrialState.COMPLETE, value=None, curve=(), **user_attrs):
    """Add a trial that ended so."""
    trial = create_trial(
        state=state,
        value=value,
        params={"optim.lr": 0.01},
        distributions={"optim.lr": FloatDistribution(0.001, 0.1, log=True)},
        intermediate_values=dict(curve),
        user_attrs=user_attrs,
    )
    study.add_trial(trial)
