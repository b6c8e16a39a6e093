"""The promotion gate: which version becomes champion, and the reason that it gives."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_registry import _keep_threads, save_small_model  # noqa: F401 (a fixture)

from pipeline.config.params import load_params
from pipeline.config.sections import RegistryConfig
from pipeline.data.batches import fixed_windows, sliding_windows
from pipeline.data.token_files import Tokens, write_shard
from pipeline.model.weights import load_model
from pipeline.registry import promotion
from pipeline.registry.promotion import Candidate, Champion, judge, known_share, model_loss, promote
from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import write_manifest

ROOT = Path(__file__).parents[3]
CONFIG = RegistryConfig(model="m", max_target_loss=0.1)
LEARNING = RegistryConfig(model="m", max_target_loss=0.1, require_target=False, replace_champion=True)
GOOD = Candidate(
    rule="sliding",
    loss=0.08,
    trained_loss=0.08,
    journal_loss=0.08,
    model_step=20,
    target_loss=0.1,
    n_tokens=64,
    data_sha256="a",
)
CHAMPION = Champion(
    "champion 1", loss=0.09, n_tokens=64, data_sha256="a", candidate_loss=lambda: pytest.fail("measured")
)
HELD_OUT = {"rule": "validation", "target_loss": 1.9, **dict.fromkeys(("loss", "trained_loss", "journal_loss"), 1.8)}
WEAK = "makes no champion: set target.rule to sliding or validation"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rolled_back": True}, "was rolled back by hand"),
        *(({"rule": rule}, f"the rule {rule} {WEAK}") for rule in ("batch", "average", "corpus")),
        ({"loss": None}, "is not evaluated: `dvc repro evaluate` measures its loss"),
        ({"journal_loss": 0.081}, "run.json disagrees with its journal: loss 0.0800 at step 20"),
        ({"loss": 0.0809}, "metrics.json says loss 0.0809, training measured 0.0800: evaluate again"),
        ({"loss": float("nan")}, "metrics.json says loss nan, training measured 0.0800: evaluate again"),
        ({"target_loss": 0.11}, "target 0.11 is above registry.max_target_loss 0.1"),
        ({"target_loss": 0.08}, "sliding rule not met: loss 0.0800, target 0.08"),
        (HELD_OUT | {"target_loss": 1.8}, "validation rule not met: loss 1.8000, target 1.8"),
    ],
)
@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_version_with_a_flaw_is_not_promoted_whether_or_not_there_is_a_champion(changes, reason, champion):
    for other in (None, ("2", "validation")):
        assert judge(replace(GOOD, **changes), champion, CONFIG, other) == (False, False, reason)


ON_CHAMPION = "on the tokens of champion 1, whose own loss is"
ON_HELD_OUT = "on the held-out tokens of champion 1, whose own loss is"
TWO_MACHINES = replace(GOOD, loss=0.0807)  # their losses may differ by one percent
OTHER_TEXT = replace(GOOD, data_sha256="b", n_tokens=65)
VALIDATED = replace(GOOD, **HELD_OUT)  # its target is above registry.max_target_loss, which is no bound for this rule
FEWER = replace(VALIDATED, data_sha256="b", n_tokens=6)  # tokens to learn from are no bound either


@pytest.mark.parametrize(
    ("candidate", "champion", "verdict"),
    [
        (GOOD, None, (True, "reached the target, and there was no champion")),
        (TWO_MACHINES, {}, (True, f"sliding loss 0.0807 {ON_CHAMPION} 0.0900")),
        (GOOD, {}, (True, f"sliding loss 0.0800 {ON_CHAMPION} 0.0900")),
        (GOOD, {"loss": 0.08}, (True, f"sliding loss 0.0800 {ON_CHAMPION} 0.0800")),
        (GOOD, {"loss": 0.07}, (False, f"worse: sliding loss 0.0800 {ON_CHAMPION} 0.0700")),
        (GOOD, {"loss": None}, (True, "reached the target; no sliding loss is recorded for champion 1")),
        (GOOD, {"n_tokens": 6500}, (False, "trained on 64 tokens, fewer than the 6,500 of champion 1")),
        (OTHER_TEXT, {"candidate_loss": lambda: 0.09}, (True, f"sliding loss 0.0900 {ON_CHAMPION} 0.0900")),
        (OTHER_TEXT, {"candidate_loss": lambda: 0.091}, (False, f"worse: sliding loss 0.0910 {ON_CHAMPION} 0.0900")),
        (
            OTHER_TEXT,
            {"candidate_loss": lambda: float("nan")},
            (False, f"worse: sliding loss nan {ON_CHAMPION} 0.0900"),
        ),
        (VALIDATED, None, (True, "reached the target, and there was no champion")),
        (VALIDATED, {"loss": 1.85}, (True, f"validation loss 1.8000 {ON_HELD_OUT} 1.8500")),
        (VALIDATED, {"loss": 1.75}, (False, f"worse: validation loss 1.8000 {ON_HELD_OUT} 1.7500")),
        (
            FEWER,
            {"loss": 1.75, "candidate_loss": lambda: 1.7},
            (True, f"validation loss 1.7000 {ON_HELD_OUT} 1.7500"),
        ),
    ],
)
def test_a_version_without_a_flaw_is_compared_with_the_champion_on_the_champions_text(candidate, champion, verdict):
    best, (accepted, reason) = None if champion is None else replace(CHAMPION, **champion), verdict
    assert judge(candidate, best, CONFIG) == (accepted, accepted, reason)


@pytest.mark.parametrize(
    ("best", "reason"),
    [
        (None, "reached the target, and there was no champion of the rule validation"),
        (replace(CHAMPION, loss=1.8), f"validation loss 1.8000 {ON_HELD_OUT} 1.8000"),
    ],
)
def test_a_champion_of_another_rule_stays_and_the_version_is_the_best_of_its_own(best, reason):
    verdict = judge(VALIDATED, best, CONFIG, ("7", "sliding"))
    assert verdict == (True, False, f"{reason}; champion 7 has the rule sliding and stays")
    verdict = judge(VALIDATED, best, LEARNING, ("7", "sliding"))
    assert verdict == (True, True, f"{reason}; it replaces champion 7, which has the rule sliding")


def test_after_learn_the_comparison_with_its_own_rule_does_not_keep_a_champion_of_another_rule():
    best = replace(CHAMPION, name="version 1 (the best of the rule validation)", loss=1.75)
    worse = "worse: validation loss 1.8000 on the held-out tokens of version 1 (the best of the rule validation)"
    worse += ", whose own loss is 1.7500"
    assert judge(VALIDATED, best, CONFIG, ("7", "sliding")) == (False, False, worse)
    verdict = judge(VALIDATED, best, LEARNING, ("7", "sliding"))
    assert verdict == (False, True, f"{worse}; it replaces champion 7, which has the rule sliding")
    assert not judge(replace(VALIDATED, rolled_back=True), best, LEARNING, ("7", "sliding")).promotes


MISSED = replace(VALIDATED, target_loss=1.7)
ANOTHER = {"data_sha256": "b", "loss": 0.001, "n_tokens": 6500}  # a text that is longer and was learnt better


@pytest.mark.parametrize(
    ("candidate", "champion", "verdict"),
    [
        (GOOD, ANOTHER, (True, "reached the target, and replaces champion 1, which has another text")),
        (GOOD, {"loss": 0.07}, (False, f"worse: sliding loss 0.0800 {ON_CHAMPION} 0.0700")),  # the same text
        (replace(GOOD, rolled_back=True), ANOTHER, (False, "was rolled back by hand")),
        (MISSED, None, (True, "is not required to reach the target, and there was no champion")),
        (
            MISSED,
            ANOTHER,
            (True, "is not required to reach the target, and replaces champion 1, which has another text"),
        ),
        (MISSED, {"loss": 1.85}, (True, f"validation loss 1.8000 {ON_HELD_OUT} 1.8500")),
        (MISSED, {"loss": 1.75}, (False, f"worse: validation loss 1.8000 {ON_HELD_OUT} 1.7500")),
    ],
)
def test_after_learn_a_version_of_another_text_replaces_the_champion(candidate, champion, verdict):
    best, (accepted, reason) = None if champion is None else replace(CHAMPION, **champion), verdict
    assert judge(candidate, best, LEARNING) == (accepted, accepted, reason)


@pytest.fixture
def measured(tmp_path, bpe):
    """A project with a small model, and a token folder of another text, whose parts are the same 20 ids."""
    save_small_model(tmp_path / "models" / "model", bpe, trained_length=8, fold_vocab=True)
    values = load_params(ROOT / "params.yaml").values
    (tmp_path / "params.yaml").write_text(str({"train": values["train"] | {"precision": "fp32"}}))
    (tokens := tmp_path / "tokens").mkdir()
    ids = [i * 37 % 50257 for i in range(20)]
    for part in ("train", "val"):
        write_shard(tokens / f"{part}-00000.bin", [ids], 50257)
    write_manifest(tokens)
    return tmp_path, tokens, ids


def trained_on(project: Path, ids: list[int]) -> None:
    (tokens := project / "data" / "tokens").mkdir(parents=True)
    write_shard(tokens / "train-00000.bin", [ids], 50257)
    write_manifest(tokens)


@pytest.mark.parametrize(("name", "windows"), [("sliding_loss", sliding_windows), ("validation_loss", fixed_windows)])
def test_the_loss_on_other_tokens_is_measured_from_the_saved_model_alone(name, windows, measured):
    """run.json is not read: records of older versions have other keys."""
    project, tokens, ids = measured
    trained_on(project, ids[:19])  # without the last token, so it does not know the text of 20
    saved = load_model(project / "models" / "model")
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(saved(torch.tensor([ids[s : min(s + 8, 19)]]))[0, first:],
                                              torch.tensor(ids[s + 1 + first : s + 9]), reduction="none")
            for s, first in windows(20, 8)
        ]  # fmt: skip
    assert model_loss(project, tokens, name) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_a_held_out_text_on_which_the_model_was_trained_is_no_comparison(measured):
    project, tokens, ids = measured
    trained_on(project, [1, *ids, 2])
    with pytest.raises(InputError, match="was trained on 100% of the other version's held-out text"):
        model_loss(project, tokens, "validation_loss")
    assert model_loss(project, tokens, "sliding_loss") > 0  # a training text may be known


def test_the_known_share_is_that_of_passages_from_all_parts_of_the_text():
    text = np.arange(3000) % 1999  # no passage of 64 ids occurs twice, but for the last thousand
    share = known_share(Tokens("val", [text[:2000].astype(np.uint16)], 50257),
                        Tokens("train", [text[:1000].astype(np.uint16)], 50257))  # fmt: skip
    assert share == pytest.approx(0.5, abs=0.04)


def test_a_write_that_the_store_refuses_is_not_called_a_read(monkeypatch):
    def refused(*_):
        raise OSError("attempt to write a readonly database")

    model = SimpleNamespace(aliases={})
    client = SimpleNamespace(get_registered_model=lambda _: model, set_registered_model_alias=refused)
    version = SimpleNamespace(name="m", version=2, tags={})
    monkeypatch.setattr(promotion, "find_version", lambda *_: version)
    monkeypatch.setattr(promotion, "open_version", lambda *_: None)
    with pytest.raises(ModelMissing) as raised:
        promote(SimpleNamespace(client=client, uri="sqlite:///mlflow.db"), "m", "2")
    assert str(raised.value) == (
        "MLflow's store sqlite:///mlflow.db fails (m: attempt to write a readonly database): "
        "get permission to write, or name another store, then repeat"
    )
