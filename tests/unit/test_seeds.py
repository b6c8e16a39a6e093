"""The benchmark of the published systems: what it records, compares and draws."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from benchmarks import seeds
from benchmarks.seeds_figure import PUBLISHED, compared
from tests.trainings import ROOT

POINTS = ROOT / "benchmarks" / "published"


@pytest.fixture
def results(prepared, tmp_path, monkeypatch):
    """The file of results, for a recipe whose workspace is a copy of `prepared`."""
    shutil.copytree(prepared, folder := tmp_path / "workspace")
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "seeds.json")
    monkeypatch.setattr(seeds, "workspace", lambda recipe: folder)
    return tmp_path / "seeds.json"


def recorded(path):
    return json.loads(path.read_text())["small"]


def test_first_steps_depend_on_their_seed_and_a_shorter_record_does_not_replace_a_longer_one(results):
    for seed, steps in ((1, 3), (2, 2), (1, 2)):
        seeds.first_steps("small", seed, steps)
    first, second = (recorded(results)["first_steps"][seed]["loss"] for seed in "12")
    assert (len(first), len(second)) == (3, 2)
    assert first[:2] != second
    assert seeds.steps_there("small", 1) == 3


def test_a_whole_run_is_recorded_with_the_loss_by_each_rule(results):
    seeds.whole_run("small", 1)
    run = recorded(results)["whole"]["1"]
    assert (run["steps"], run["rule"], run["curve"][-1][0]) == (12, "sliding", 12)
    for rule in ("corpus", "sliding"):
        assert run["losses"][rule] == pytest.approx(run[f"{rule}_loss"][-1][1])
    assert run["losses"]["average"] == pytest.approx(np.mean([loss for _, loss in run["curve"]]), rel=1e-4)
    assert run["losses"]["batch"] == pytest.approx(run["curve"][-1][1], rel=1e-4)
    before = results.read_bytes()
    seeds.whole_run("small", 1)  # the run is finished: no more steps
    assert results.read_bytes() == before


def test_a_published_step_is_compared_with_our_next_one():
    table = compared("seed-003", {"1": {"loss": [11.0, 10.5, 10.0]}, "2": {"loss": [10.8, 10.7, 10.0]}})
    assert list(table.index) == [1, 2, 3]
    assert list(table["published"]) == [10.89905, 10.607647, 10.145452]
    assert table["excess"].iloc[0] == pytest.approx(10.89905 - 10.9)
    assert table["spread"].tolist() == pytest.approx([0.2, 0.2, 0.0])


def test_published_points_have_the_tokens_of_their_steps_and_are_all_drawn():
    step_tokens = {"seed-000": 2048, "seed-001": 4096, "seed-002": 2048, "seed-003": 32768, "seed-004": 2048}
    assert set(PUBLISHED) == set(step_tokens) == {path.stem for path in POINTS.glob("*.csv")}
    for name, tokens in step_tokens.items():
        points = pd.read_csv(POINTS / f"{name}.csv")
        assert (points["tokens"] == (points["step"] + 1) * tokens).all(), name  # they count steps from 0
        if points["step"].iloc[0] == 0:
            assert points["loss"].iloc[0] == pytest.approx(math.log(50257), abs=0.15), name  # an untrained model
