"""Pruner: the forecast of a curve along the best one, Optuna studies that use it, and the package for OptunaHub."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sweep import pruner
from pipeline.sweep.pruner import ExtrapolationPruner, best_trial, forecast
from tests.studies import add

# Mean losses of the epochs of a run like the recipe `laptop`'s: flat at first, falling faster towards the end.
LOSSES = [10.8, 5.4, 4.1, 3.6, 2.9, 1.9, 0.95, 0.3]
BEST = [(34.0 * i, loss) for i, loss in enumerate(LOSSES)]
END = BEST[-1][0]
BUMPY = [(0.0, 10.0), (10.0, 4.0), (20.0, 5.0), (30.0, 1.0)]


@pytest.mark.parametrize(
    ("curve", "best", "expected"),
    [
        *(([point], BEST, END) for point in BEST),  # the best curve ends where it ended
        ([(100, 4.75)], BEST, 100 + END - 51),  # halfway between its points at 34 and 68
        ([(50, 9.0), (100, 4.1)], BEST, 100 + END - 68),  # only the last report counts
        ([(50, 0.2)], BEST, 50),  # already lower than the best curve's end
        ([(5, 4.5)], BUMPY, 5 + 30 - 10 * 5.5 / 6),  # above the bump, which does not count
        ([(5, 3.0)], BUMPY, 5 + 30 - (20 + 10 / 3)),  # below it: the best fell from 4 to 1 between 20 and 30
        ([(5, 3.0)], [(0, 10.0), (10, math.nan), (20, 3.0), (30, 1.0)], 5 + 10),  # a loss that is not a number
        ([(5, math.nan)], BUMPY, math.inf),
        ([(5, -0.5)], [(0, -0.2), (10, -0.5), (40, -0.9)], 5 + 30),  # accuracies
    ],
)
def test_a_forecast_follows_the_best_curve_from_the_same_loss_on(curve, best, expected):
    assert forecast(curve, best) == pytest.approx(expected)


@settings(max_examples=20)
@given(speed=st.floats(0.25, 3.0), at=st.floats(0.05, 0.95))
def test_a_forecast_is_behind_the_best_by_what_the_trial_is_behind_now(speed, at):
    spent, loss = at * END / speed, float(np.interp(at * END, *zip(*BEST, strict=True)))
    assert forecast([(spent, loss)], BEST) == pytest.approx(END + spent - at * END)


@pytest.mark.parametrize(("loss", "is_pruned"), [(3.0, False), (3.6, False), (3.8, True), (9.0, True)])
def test_a_trial_is_pruned_when_its_forecast_is_too_far_behind_the_best(loss, is_pruned):
    study = optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.05))
    first = study.ask()
    first.report(9.9, 10**9)
    assert not first.should_prune()  # no trial has reached the target
    add(study, value=100.0, curve={0: 10.0, 50: 3.0, 100: 0.1})
    trial = study.ask()
    assert not trial.should_prune()  # it has no report yet
    trial.report(loss, 50)  # the best had 3.6 at 45.7 and 3.8 at 44.3, and the tolerance is 5
    assert trial.should_prune() is is_pruned


def test_a_best_trial_that_only_repeats_another_one_prunes_by_the_curve_of_that_one():
    study = optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.05))
    add(study, value=90.0)  # without reports
    add(study, value=90.0, curve={0: 10.0, 90: 0.1})
    assert best_trial(study).number == 1
    trial = study.ask()
    trial.report(9.0, 80)
    assert trial.should_prune()


def test_the_best_trial_is_found_without_reading_the_trials_that_are_running(monkeypatch):
    study = optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.05))
    add(study, value=90.0, curve={0: 10.0, 90: 0.1})
    trial = study.ask()
    trial.report(9.0, 80)
    monkeypatch.delattr(type(study), "get_trials")  # reads all; 64 running ones took a database 350 ms a report
    assert trial.should_prune()


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_that_is_no_share_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance is"):
        ExtrapolationPruner(tolerance)


def test_a_study_that_maximises_is_refused_at_its_first_report():
    def objective(trial):
        trial.report(0.5, 1)
        return trial.should_prune()

    study = optuna.create_study(direction="maximize", pruner=ExtrapolationPruner())
    with pytest.raises(ValueError, match="direction 'minimize'"):
        study.optimize(objective, n_trials=1)


# The package for OptunaHub. Its code is a copy of the module, since the registry needs it in one folder, and this
# project's package must contain the module. Only the module is edited.
REGISTRY = Path(__file__).parents[3] / "examples" / "optunahub" / "package"
PACKAGE = REGISTRY / "pruners" / "extrapolation"


def load(path):
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_package_is_a_copy_of_the_module_which_needs_nothing_else_of_this_project():
    source = Path(pruner.__file__).read_text()
    assert not re.search("^ *(from|import) (pipeline|torch)", source, re.MULTILINE)
    assert (PACKAGE / "__init__.py").read_text() == source, f"cp {pruner.__file__} {PACKAGE}/__init__.py"


def test_the_package_has_the_header_that_the_registry_requires():
    header = yaml.safe_load((PACKAGE / "README.md").read_text().split("---\n")[1])
    assert header.keys() == {"author", "title", "description", "tags", "optuna_versions", "license"}
    assert "pruner" in header["tags"]
    assert header["optuna_versions"]
    assert header["license"] == (PACKAGE / "LICENSE").read_text().splitlines()[0]


def test_the_example_finds_the_same_best_trials_at_a_fraction_of_the_cost(monkeypatch):
    def load_local_module(package, registry_root):  # as optunahub does
        return load(Path(registry_root) / package / "__init__.py")

    monkeypatch.setitem(sys.modules, "optunahub", SimpleNamespace(load_local_module=load_local_module))
    example = load(PACKAGE / "example.py")
    package = load_local_module("pruners/extrapolation", REGISTRY)
    without = [example.run(optuna.pruners.NopPruner(), seed, n_trials=12) for seed in range(3)]
    pruned = [example.run(package.ExtrapolationPruner(), seed, n_trials=12) for seed in range(3)]
    assert [best for best, _ in pruned] == [best for best, _ in without]
    assert sum(cost for _, cost in pruned) < 0.5 * sum(cost for _, cost in without)  # .24 with 20 seeds of 40 trials
