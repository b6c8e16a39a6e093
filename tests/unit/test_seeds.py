"""The benchmark of the published systems: what it records, compares and draws."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from benchmarks import seeds
from benchmarks.seeds_figure import PUBLISHED, compared, draw
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


def test_first_steps_are_recorded_one_by_one_and_depend_on_their_seed(results, monkeypatch):
    seeds.first_steps("small", 1, 3)
    straight = recorded(results)["first_steps"]["1"]["loss"]
    results.unlink()
    note = seeds.note

    def interrupted(recipe, kind, seed, rows):
        note(recipe, kind, seed, rows)
        if len(rows["loss"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(seeds, "note", interrupted)
        seeds.first_steps("small", 1, 3)
    assert recorded(results)["first_steps"]["1"]["loss"] == straight[:2]
    assert seeds.steps_there("small", 1) == 2
    seeds.first_steps("small", 1, 3)
    longer = recorded(results)["first_steps"]["1"]
    seeds.first_steps("small", 2, 3)
    seeds.first_steps("small", 1, 2)
    assert longer["loss"] == straight != recorded(results)["first_steps"]["2"]["loss"]
    assert recorded(results)["first_steps"]["1"] == longer  # a shorter record does not replace it


def test_a_whole_run_is_recorded_with_the_loss_by_each_rule(results):
    seeds.whole_run("small", 1)
    run = recorded(results)["whole"]["1"]
    assert (run["steps"], run["rule"], run["curve"][-1][0]) == (12, "corpus", 12)
    assert run["losses"]["corpus"] == pytest.approx(run["corpus_loss"][-1][1])
    assert run["losses"]["average"] == pytest.approx(np.mean([loss for _, loss in run["curve"]]), rel=1e-4)
    assert run["losses"]["batch"] == pytest.approx(run["curve"][-1][1], rel=1e-4)
    before = results.read_bytes()
    seeds.whole_run("small", 1)  # the run is finished: no more steps
    assert results.read_bytes() == before


def test_a_long_curve_is_thinned_to_means_of_its_parts():
    curve = seeds.thinned(np.arange(1, 1001, dtype=float))
    assert len(curve) <= seeds.CURVE_POINTS
    assert (curve[0], curve[-1]) == ([3, 2.0], [999, 998.0])


def test_a_published_step_is_compared_with_our_next_one():
    table = compared("seed-003", {"1": {"loss": [11.0, 10.5, 10.0]}, "2": {"loss": [10.8, 10.7, 10.0]}})
    assert list(table.index) == [1, 2, 3]
    assert list(table["published"]) == [10.89905, 10.607647, 10.145452]
    assert table["excess"].iloc[0] == pytest.approx(10.89905 - 10.9)
    assert table["spread"].tolist() == pytest.approx([0.2, 0.2, 0.0])


def test_a_picture_is_drawn_from_the_results(tmp_path):
    draw({"seed-000": {"first_steps": {"1": {"loss": [11.0, 9.5, 9.1]}}}}, picture := tmp_path / "picture.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_published_points_have_the_tokens_of_their_steps_and_are_all_drawn():
    step_tokens = {"seed-000": 2048, "seed-001": 4096, "seed-002": 2048, "seed-003": 32768, "seed-004": 2048}
    assert set(PUBLISHED) == set(step_tokens) == {path.stem for path in POINTS.glob("*.csv")}
    for name, tokens in step_tokens.items():
        points = pd.read_csv(POINTS / f"{name}.csv")
        assert (points["tokens"] == (points["step"] + 1) * tokens).all(), name  # they count steps from 0
        if points["step"].iloc[0] == 0:
            assert points["loss"].iloc[0] == pytest.approx(math.log(50257), abs=0.15), name  # an untrained model
