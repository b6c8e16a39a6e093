"""The published systems beside ours: what is noted, compared and drawn, and the padded vocabulary of one of them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import seeds
from benchmarks.seeds_figure import PUBLISHED, compared, draw
from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.data.encode import write_tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import Generator
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[2]
POINTS = ROOT / "benchmarks" / "published"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where the figures of this test go."""
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "seeds.json")
    return tmp_path / "seeds.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bpe, tokenizer, shakespeare):
    """A workspace of a small recipe, with its tokens: 40 steps of 256 tokens."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    (folder / "short.yaml").write_text(f"optim: {{max_tokens: {256 * 40}}}\ntrain: {{threads: 1}}\n")
    apply_recipe(str(folder / "short.yaml"), folder / "params.yaml")
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    write_tokens(shakespeare, tokenizer, folder / "data" / "tokens", fraction=0.005)
    return folder


@pytest.fixture
def workspace(prepared, monkeypatch):
    monkeypatch.setattr(seeds, "workspace", lambda recipe: prepared)
    return prepared


def noted(path, recipe="small"):
    return json.loads(path.read_text())[recipe]


def test_first_steps_are_those_of_their_seed_and_noted_one_by_one(workspace, results, monkeypatch):
    seeds.first_steps("small", 1, 3)
    straight = noted(results)["first_steps"]["1"]["loss"]
    results.unlink()
    noting = seeds.note

    def dying(recipe, kind, seed, rows):
        noting(recipe, kind, seed, rows)
        if len(rows["loss"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(seeds, "note", dying)
        seeds.first_steps("small", 1, 3)
    assert noted(results)["first_steps"]["1"]["loss"] == straight[:2]
    assert seeds.steps_there("small", 1) == 2
    seeds.first_steps("small", 1, 3)
    seeds.first_steps("small", 2, 3)
    assert noted(results)["first_steps"]["1"]["loss"] == straight != noted(results)["first_steps"]["2"]["loss"]
    assert seeds.prepare("small", 2)[0].train.seed == 2


def test_a_shorter_record_takes_no_place_of_a_longer_one(workspace, results):
    seeds.first_steps("small", 1, 3)
    before = noted(results)["first_steps"]["1"]
    seeds.first_steps("small", 1, 2)
    after = noted(results)["first_steps"]["1"]
    assert after["loss"] == before["loss"]
    assert after["step_s"] == before["step_s"]  # it was not even touched


def test_a_whole_run_is_noted_with_the_loss_by_each_rule(workspace, results):
    seeds.whole_run("small", 1)
    run = noted(results)["whole"]["1"]
    assert (run["steps"], run["rule"], run["curve"][-1][0]) == (40, "corpus", 40)
    assert run["losses"]["corpus"] == pytest.approx(run["corpus_loss"][-1][1])
    assert run["losses"]["average"] == pytest.approx(np.mean([loss for _, loss in run["curve"]]), rel=1e-4)
    assert run["losses"]["batch"] == pytest.approx(run["curve"][-1][1], rel=1e-4)
    before = results.read_bytes()
    seeds.whole_run("small", 1)  # finished: no step more
    assert results.read_bytes() == before


def test_a_long_curve_is_thinned_to_means_of_its_parts():
    curve = seeds.thinned(np.arange(1, 1001, dtype=float))
    assert len(curve) <= seeds.CURVE_POINTS
    assert curve[0] == [3, 2.0]
    assert curve[-1] == [999, 998.0]


def test_a_published_step_is_compared_with_the_next_of_ours():
    table = compared("seed-003", {"1": {"loss": [11.0, 10.5, 10.0]}, "2": {"loss": [10.8, 10.7, 10.0]}})
    assert list(table.index) == [1, 2, 3]
    assert list(table["published"]) == [10.89905, 10.607647, 10.145452]
    assert table["excess"].iloc[0] == pytest.approx(10.89905 - 10.9)
    assert table["spread"].tolist() == pytest.approx([0.2, 0.2, 0.0])


@pytest.mark.parametrize("known", [{}, {"seed-000": {"first_steps": {"1": {"loss": [11.0, 9.5, 9.1]}}}}])
def test_the_picture_is_made_of_the_file_alone(known, tmp_path):
    draw(known, tmp_path / "a.png")
    draw(known, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "step_tokens"),
    [("seed-000", 2048), ("seed-001", 4096), ("seed-002", 2048), ("seed-003", 32768), ("seed-004", 2048)],
)
def test_published_points_have_the_tokens_of_their_steps(name, step_tokens):
    points = pd.read_csv(POINTS / f"{name}.csv")
    assert (points["tokens"] == (points["step"] + 1) * step_tokens).all()  # they count steps from 0
    if points["step"].iloc[0] == 0:
        assert points["loss"].iloc[0] == pytest.approx(math.log(50257), abs=0.15)  # untrained, and undivided


def test_every_published_run_is_drawn():
    assert sorted(PUBLISHED) == sorted(path.stem for path in POINTS.glob("*.csv"))


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_id_that_pads_the_vocabulary_of_seed_003_is_never_written(temperature, tmp_path, tokenizer):
    params = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    apply_recipe("seed-003", params, ROOT / "recipes")
    shape = RunConfig.of(load_params(params)).model
    assert shape.vocab_size == 50_304
    shape = shape.updated(n_layer=1, n_head=1, n_embd=16, block_size=32)
    model = GPT(shape, Vocabulary.full(shape.vocab_size)).initialise(1).eval()
    with torch.no_grad():  # all it wants to write is padding
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[50_257:] = 10.0
    assert (model(torch.zeros(1, 8, dtype=torch.int64)).argmax(dim=2) > 50_256).all()
    generator = Generator(model, tokenizer)
    pieces = list(generator.stream(["ROMEO:", ""], Sampling(max_tokens=30, temperature=temperature)))
    ids = [i for piece in pieces for i in piece.ids]
    assert ids
    assert max(ids) <= 50_256
    probabilities = generator.next_tokens("ROMEO:")
    assert probabilities.shape == (50_257,)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-4)
