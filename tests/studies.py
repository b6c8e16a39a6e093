"""Studies in memory, trials that ended in a given state, and a project whose trials are tiny runs."""

import shutil
from pathlib import Path

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from pipeline.config.params import load_params
from pipeline.config.sections import SweepConfig
from pipeline.sweep.study import find_study, join_study, shared_settings
from pipeline.training.config import RunConfig
from tests.trainings import change, epochs

ROOT = Path(__file__).parents[1]
SPACE = {"optim": {"lr": {"low": 0.001, "high": 0.1, "log": True}}}
DISTRIBUTIONS = {
    "optim.lr": FloatDistribution(0.001, 0.1, log=True),
    "optim.schedule": CategoricalDistribution(["linear", "wsd"]),
}


def sweep_config(**changes):
    given = {"study": "s", "space": SPACE, "trials": 4, "sampler": "random", "pruner_tolerance": 0.05, **changes}
    return load_params(ROOT / "params.yaml").overridden(SweepConfig, given).section(SweepConfig)


def shared_by(sweep, **changes):
    params = load_params(ROOT / "params.yaml")
    for key, value in changes.items():
        section, name = key.split(".")
        params.values[section][name] = value
    return shared_settings(sweep, RunConfig.of(params), "d" * 64)


def new_study(sweep):
    return join_study(sweep, shared_by(sweep), InMemoryStorage())


def add(study, state=TrialState.COMPLETE, value=None, curve=(), lr=0.01, schedule="linear", **user_attrs):
    """Add a trial that has ended."""
    trial = create_trial(
        state=state,
        value=value,
        params={"optim.lr": lr, "optim.schedule": schedule},
        distributions=DISTRIBUTIONS,
        intermediate_values=dict(curve),
        user_attrs=user_attrs,
    )
    study.add_trial(trial)


def fill(study):
    """Add five trials: the last of three that reached the target is the best."""
    add(study, value=50_000.0, curve={10_000: 5.0, 50_000: 0.1})
    add(study, TrialState.PRUNED, curve={10_000: 5.0, 20_000: 4.0}, lr=0.002)
    add(study, value=60_000.0, curve={10_000: 5.0, 60_000: 0.1}, lr=0.02)
    add(study, value=40_000.0, curve={10_000: 4.0, 40_000: 0.1}, lr=0.03, schedule="wsd")
    add(study, TrialState.FAIL, curve={10_000: 5.0, 20_000: 4.0}, lr=0.09)
    return study


def sweep_project(prepared, folder):
    """Make a project with the tokens of `prepared`, and a study whose trials take about 20 steps."""
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    space = {"optim": {"lr": {"low": 0.003, "high": 0.006, "log": True}}}
    study = {"study": "tiny", "sampler": "random", "pruner": "none", "space": space}
    change(folder, **{f"sweep.{key}": value for key, value in study.items()})
    longer = {**epochs(folder, 300), "samples.max_tokens": 20, "model.dropout": 0.0}
    change(folder, **longer, **{"optim.lr": 0.004, "target.loss": 6.0, "checkpoint.interval_steps": 5})


def study_here(name=None):
    """The study of the project in the working directory, or another one of its storage."""
    sweep = load_params().section(SweepConfig)
    return find_study(sweep.updated(study=name) if name else sweep, Path.cwd())


def list_folder(prefix):
    """The folder of the only list of trials whose name begins with `prefix`; None before there is one."""
    return next((path for path in Path("checkpoints").glob(f"{prefix}-*") if path.is_dir()), None)
