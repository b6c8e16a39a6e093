"""The promotion gate: which version becomes champion, and the reason that it gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_registry import _keep_threads, save_small_model  # noqa: F401 (a fixture)

from pipeline.config.params import load_params
from pipeline.data.batches import sliding_windows
from pipeline.data.token_files import write_shard
from pipeline.model.weights import load_model
from pipeline.registry.promotion import Candidate, Champion, judge, model_loss
from pipeline.system.files import write_manifest

ROOT = Path(__file__).parents[3]
GOOD = Candidate(
    sliding_loss=0.08,
    evaluated_loss=0.08,
    trained_loss=0.08,
    journal_loss=0.08,
    model_step=20,
    target_loss=0.1,
    n_tokens=64,
    data_sha256="a",
)
CHAMPION = Champion(
    "1", sliding_loss=0.09, n_tokens=64, data_sha256="a", candidate_loss=lambda: pytest.fail("measured")
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rolled_back": True}, "was rolled back by hand"),
        ({"sliding_loss": None}, "is not evaluated: `dvc repro evaluate` measures its loss"),
        ({"evaluated_loss": None}, "is not evaluated: `dvc repro evaluate` measures its loss"),
        ({"journal_loss": 0.081}, "run.json disagrees with its journal: loss 0.0800 at step 20"),
        ({"evaluated_loss": 0.0809}, "metrics.json says loss 0.0809, training measured 0.0800: evaluate again"),
        ({"evaluated_loss": float("nan")}, "metrics.json says loss nan, training measured 0.0800: evaluate again"),
        ({"target_loss": 0.11}, "target 0.11 is above registry.max_target_loss 0.1"),
        ({"sliding_loss": 0.1}, "sliding rule not met: loss 0.1000, target 0.1"),
        ({"target_loss": 0.08}, "sliding rule not met: loss 0.0800, target 0.08"),
    ],
)
@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_version_with_a_flaw_is_not_promoted_whether_or_not_there_is_a_champion(changes, reason, champion):
    assert judge(replace(GOOD, **changes), champion, 0.1) == (False, reason)


ON_CHAMPION = "on the tokens of champion 1, whose own loss is"
TWO_MACHINES = replace(GOOD, sliding_loss=0.0807, evaluated_loss=0.0807)  # their losses may differ by one percent
OTHER_TEXT = replace(GOOD, data_sha256="b", n_tokens=65)


@pytest.mark.parametrize(
    ("candidate", "champion", "verdict"),
    [
        (GOOD, None, (True, "reached the target, and there was no champion")),
        (TWO_MACHINES, {}, (True, f"sliding loss 0.0807 {ON_CHAMPION} 0.0900")),
        (GOOD, {}, (True, f"sliding loss 0.0800 {ON_CHAMPION} 0.0900")),
        (GOOD, {"sliding_loss": 0.08}, (True, f"sliding loss 0.0800 {ON_CHAMPION} 0.0800")),
        (GOOD, {"sliding_loss": 0.07}, (False, f"worse: sliding loss 0.0800 {ON_CHAMPION} 0.0700")),
        (GOOD, {"sliding_loss": None}, (True, "reached the target; the sliding loss of champion 1 is not known")),
        (GOOD, {"n_tokens": 6500}, (False, "trained on 64 tokens, champion 1 on 6,500")),
        (OTHER_TEXT, {"candidate_loss": lambda: 0.09}, (True, f"sliding loss 0.0900 {ON_CHAMPION} 0.0900")),
        (OTHER_TEXT, {"candidate_loss": lambda: 0.091}, (False, f"worse: sliding loss 0.0910 {ON_CHAMPION} 0.0900")),
        (
            OTHER_TEXT,
            {"candidate_loss": lambda: float("nan")},
            (False, f"worse: sliding loss nan {ON_CHAMPION} 0.0900"),
        ),
    ],
)
def test_a_version_without_a_flaw_is_compared_with_the_champion_on_the_champions_text(candidate, champion, verdict):
    assert judge(candidate, None if champion is None else replace(CHAMPION, **champion), 0.1) == verdict


def test_the_loss_on_other_tokens_is_measured_from_the_saved_model_alone(tmp_path, bpe):
    """run.json is not read: records of older versions have other keys."""
    save_small_model(tmp_path / "models" / "model", bpe, trained_length=8, fold_vocab=True)
    values = load_params(ROOT / "params.yaml").values
    (tmp_path / "params.yaml").write_text(str({"train": values["train"] | {"precision": "fp32"}}))
    (tokens := tmp_path / "tokens").mkdir()
    ids = [i * 37 % 50257 for i in range(20)]
    write_shard(tokens / "train-00000.bin", [ids], 50257)
    write_manifest(tokens)
    saved = load_model(tmp_path / "models" / "model")
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(saved(torch.tensor([ids[s : s + 8]]))[0, first:],
                                              torch.tensor(ids[s + 1 + first : s + 9]), reduction="none")
            for s, first in sliding_windows(20, 8)
        ]  # fmt: skip
    assert model_loss(tmp_path, tokens) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
