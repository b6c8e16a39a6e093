"""Training, evaluation, registration and generation on a device that lacks what Apple's MPS lacks."""

import shutil
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.config.sections import EvaluateConfig
from pipeline.model.evaluate import evaluate_model
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.registry.promotion import model_loss
from pipeline.system.files import read_json
from pipeline.training.run import REPEATED
from tests.mps import mps  # noqa: F401 (a fixture)
from tests.trainings import bits, change, run_folder, train, train_until_killed


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_mps_trains_resumes_inexactly_evaluates_and_generates(workspace, mps, name, capsys):  # noqa: F811
    samples = {"samples.interval_steps": 5, "samples.prompts": ["ROMEO:"]}
    change(workspace, **samples, **{"train.compile": True, "optim.name": name})
    train()
    assert "train.compile: not on mps" in capsys.readouterr().out
    straight, result = bits(), read_json(Path("models/run.json"))
    shutil.rmtree("checkpoints")
    train_until_killed(8)
    train()
    again, repeated = bits(), [f"{REPEATED} after step 6"]
    assert read_json(Path("models/run.json")) == result | {"inexact": repeated}
    del straight["models/run.json"], again["models/run.json"]
    assert again == straight  # with dropout, whose random numbers are those of MPS; only its real kernels differ

    run, tokens = read_json(Path("models/run.json")), Path("data/tokens")
    assert run["environment"]["device"].startswith("mps ")
    run["environment"]["precision"] = "bf16"  # trained on another device
    metrics, _ = evaluate_model(Path("models/model"), tokens, run, load_params().section(EvaluateConfig))
    assert metrics["sliding_loss"] == run["results"]["loss"]
    assert "evaluating in fp32: the run's precision bf16" in capsys.readouterr().out
    assert model_loss(Path(), tokens, "sliding_loss") == pytest.approx(metrics["sliding_loss"])
    shutil.copytree(tokens, "models/tokens")
    generator = load_generator(Path("models"))
    sample = max((run_folder() / "samples").iterdir()).read_text().split("\n\n---")[0]
    assert generator.text("ROMEO:", Sampling(max_tokens=5, temperature=0)) in sample
    assert generator.next_tokens("!").sum() == pytest.approx(1)
