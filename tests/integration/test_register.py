"""`register` with a real store: versions, aliases, verdicts, and repetition after it was killed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)
from fixtures_registry import _keep_threads, _name, alter, save_small_model  # noqa: F401 (fixtures)

from pipeline.config.sections import RegistryConfig
from pipeline.registry.artifacts import LISTING_TAG, fetch_version, open_version
from pipeline.registry.catalog import describe_version, find_version, identity_of, list_versions, verify
from pipeline.registry.promotion import promote, rollback
from pipeline.registry.register import register
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import read_json, verify_manifest, write_json, write_manifest
from pipeline.system.host import SOURCE_ROOT
from pipeline.tracking.mlflow_runs import runs_of


@pytest.fixture
def register_it(store, name, cheap_versions):
    """Register a project; `loss` is its loss on the champion's text if that is another one."""

    def call(project: Path, loss: float | Exception = 0.0) -> dict:
        def loss_on(_project: Path, tokens: Path, name: str) -> float:
            verify_manifest(tokens)
            assert name in ("sliding_loss", "validation_loss")
            if isinstance(loss, Exception):
                raise loss
            return loss

        return register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1), loss_on)

    return call


def aliases(store, name: str) -> dict[str, str]:
    return {alias: str(number) for alias, number in store.client.get_registered_model(name).aliases.items()}


def test_the_first_model_that_reached_the_target_is_champion(store, name, register_it, tmp_path):
    """Registering it again changes nothing."""
    project = trained_project(tmp_path / "project")
    done = register_it(project)
    assert done == read_json(project / "reports" / "registered.json")
    assert (done["champion"], done["rule"]) == (True, "sliding")
    assert done["aliases"] == ["candidate", "champion", "champion-sliding"]
    identity = read_json(project / "models" / "run.json")
    tags = find_version(store, name, "1").tags
    assert runs_of(store, identity["fingerprint"])[0].info.run_id == done["run_id"] == tags["run_id"]
    assert (tags["fingerprint"], tags["data_sha256"]) == (identity["fingerprint"], identity["data_sha256"])
    assert (tags["sliding_loss"], tags["target_loss"], tags["train_tokens"]) == ("0.09", "0.1", "64")
    assert (tags["steps_to_target"], tags["tokens_to_target"]) == ("20", "160")
    assert {"git_commit", "tree_clean", "verdict"} <= tags.keys()

    assert register_it(project) == {**done, "reason": "is the champion"}
    assert find_version(store, name, "1").tags == tags
    assert len(list_versions(store, name)) == 1


class Killed(BaseException):
    """Like SIGKILL, nothing catches it."""


def killing(call: Callable, after: bool) -> Callable:
    """Replace a method by one that dies, after the call or instead of it."""

    def killed(*arguments, **named):
        if after:
            call(*arguments, **named)
        raise Killed

    return killed


BEFORE = (
    "create_registered_model log_batch create_logged_model log_model_artifacts finalize_logged_model "
    "create_model_version log_outputs set_registered_model_alias"
).split()
AFTER = ["create_run", "set_registered_model_alias"]


def test_a_killed_registration_can_be_repeated(store, name, register_it, tmp_path, monkeypatch):  # C5
    """Killed at the first call of a method that changes the store; a better model each time."""
    client, champion = type(store.client), None
    moments = [*((step, False) for step in BEFORE), *((step, True) for step in AFTER)]
    for number, (step, after) in enumerate(moments, 1):
        project = trained_project(tmp_path / str(number), loss=0.09 - number / 1000)
        with monkeypatch.context() as crash:
            crash.setattr(client, step, killing(getattr(client, step), after))
            with pytest.raises(Killed):
                register_it(project)
        for alias in aliases(store, name) if champion else ():
            open_version(store, find_version(store, name, alias))
        done = register_it(project)
        assert done["aliases"] == ["candidate", "champion", "champion-sliding"]
        assert len(list_versions(store, name)) == number
        models = store.client.search_logged_models([store.experiment_id], f"source_run_id = '{done['run_id']}'")
        assert [model.status for model in models] == ["READY"]  # no second one, and none half-filled
        assert len({output.model_id for output in store.client.get_run(done["run_id"]).outputs.model_outputs}) == 1
        assert len(runs_of(store, done["fingerprint"])) == 1
        champion = done["version"]
        assert find_version(store, name, champion).tags["passed_gate"] == "true"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_champion_with_lost_or_altered_files_is_registered_again(store, name, register_it, tmp_path):  # C7
    project, original = trained_project(tmp_path / "project"), None
    register_it(project)
    for number, spoil in enumerate(
        (
            lambda version: shutil.rmtree(version / "artifacts" / "model"),
            lambda version: alter(version / "artifacts" / "model" / "model.safetensors"),
            lambda version: (version / "code" / "pipeline" / "planted.py").write_text("import os"),
        ),
        1,
    ):
        folder, again = fetch_version(store, find_version(store, name, str(number)), ""), str(number + 1)
        original = original or contents(folder)
        spoil(folder)
        altered = contents(folder)
        assert register_it(project)["version"] == again
        assert aliases(store, name) == {"champion": again, "champion-sliding": again, "candidate": again}
        assert contents(open_version(store, find_version(store, name, again)).parent) == original
        assert contents(folder) == altered  # stored files are not overwritten
    assert register_it(project)["version"] == "4"


def test_a_version_whose_run_was_removed_for_good_is_usable_after_it_is_registered_again(
    store, name, register_it, tmp_path
):
    project = trained_project(tmp_path / "project")
    removed = register_it(project)["run_id"]
    store.client.delete_run(removed)
    store.client._tracking_client.store._hard_delete_run(removed)  # as `mlflow gc`
    with pytest.raises(ModelMissing, match="`dvc repro -f -s register`"):
        describe_version(store, version := find_version(store, name, "1"), open_version(store, version))
    assert register_it(project)["run_id"] != removed
    version = find_version(store, name, "1")
    assert describe_version(store, version, open_version(store, version))["history"]["loss"]
    assert identity_of(store, version)["environment"]


def test_an_early_version_without_a_listing_stays_usable(store, name, register_it, tmp_path):
    project = trained_project(tmp_path / "project")
    register_it(project)
    store.client.delete_model_version_tag(name, "1", LISTING_TAG)
    alter(open_version(store, find_version(store, name, "1")).parent / "MLmodel")
    assert register_it(project)["version"] == "1"
    version = find_version(store, name, "1")
    assert verify(store, version).endswith("; its code has no hash and is not verified")
    assert LISTING_TAG not in version.tags  # a hash is never made from files that nothing verified


def test_only_a_model_that_passes_the_gate_takes_the_champions_place(store, name, register_it, tmp_path):
    register_it(trained_project(tmp_path / "champion"))
    worse = trained_project(tmp_path / "worse", loss=0.099)
    other_text = {"loss": 0.05, "salt": 1}
    invalid = trained_project(tmp_path / "invalid")
    record = read_json(path := invalid / "models" / "run.json")
    write_json(path, record | {"results": record["results"] | {"model_step": 99}})
    rivals = [
        (worse, 0.0, "worse: sliding loss 0.0990 on the tokens of champion 1, whose own loss is 0.0900"),
        (
            trained_project(tmp_path / "2", **other_text),
            0.095,
            "worse: sliding loss 0.0950 on the tokens of champion 1",
        ),
        (trained_project(tmp_path / "3", **other_text), IntegrityError("it broke"), "could not be judged: Integrity"),
        (invalid, 0.0, "could not be judged: KeyError: 99"),
    ]
    for number, (project, loss, reason) in enumerate(rivals, 2):
        done = register_it(project, loss)
        assert aliases(store, name) == {"champion": "1", "champion-sliding": "1", "candidate": str(number)}
        assert (done["champion"], done["aliases"]) == (False, ["candidate"])
        served = f"the page and `generate` use champion 1: `python -m pipeline models promote {number}` makes version"
        assert done["next_step"].startswith(served)
        assert ("registry.model" in done["next_step"]) == (number in (3, 4))  # of another text
        assert done["reason"].startswith(reason)
        assert find_version(store, name, str(number)).tags["verdict"] == done["reason"]
        assert store.client.get_run(done["run_id"]).info.status == "FINISHED"

    store.client.set_model_version_tag(name, "2", "sliding_loss", "0.0")  # forged
    assert register_it(worse)["reason"].startswith("worse: sliding loss 0.0990")
    assert find_version(store, name, "2").tags["sliding_loss"] == "0.099"
    done = register_it(trained_project(tmp_path / "4", loss=0.095, n_tokens=65, salt=1), 0.09)
    assert (done["champion"], done["version"], done["next_step"]) == (True, "6", None)
    assert register_it(trained_project(tmp_path / "5", n_tokens=65, salt=1))["reason"].startswith(
        "sliding loss 0.0900 on"
    )


def test_a_champion_of_another_rule_stays_and_each_rule_has_its_own_best(store, name, register_it, tmp_path):
    def validated(folder: str, loss: float, **made) -> Path:
        return trained_project(tmp_path / folder, loss, rule="validation", target=1.9, **made)

    def register_one(folder: str, loss: float, **made) -> tuple[bool, str, str | None]:
        done = register_it(validated(folder, loss, **made), 1.7)
        return done["champion"], done["reason"], done["next_step"]

    register_it(trained_project(tmp_path / "champion"))
    promotes, reason, then = register_one("first", 1.8)
    assert not promotes
    first = "reached the target, and there was no champion of the rule validation"
    assert reason == f"{first}; champion 1 has the rule sliding and stays"
    assert then is not None
    assert "`python -m pipeline models promote 2`" in then
    assert "give this rule a model of its own: set registry.model" in then
    assert aliases(store, name) == {
        "champion": "1", "champion-sliding": "1", "champion-validation": "2", "candidate": "2"
    }  # fmt: skip
    assert find_version(store, name, "2").tags["passed_gate"] == "true"
    assert register_it(validated("again", 1.85))["reason"].startswith("worse: validation loss 1.8500 on the held-out")
    assert "although the gate refused it" not in promote(store, name, "2")  # by hand

    assert register_one("better", 1.75) == (
        True, "validation loss 1.7500 on the held-out tokens of champion 2, whose own loss is 1.8000", None
    )  # fmt: skip
    longer = register_it(trained_project(tmp_path / "longer", loss=0.08, n_tokens=65))
    best = "on the tokens of version 1 (the best of the rule sliding), whose own loss is 0.0900"
    assert longer["reason"].endswith(f"{best}; champion 4 has the rule validation and stays")
    assert aliases(store, name) == {
        "champion": "4", "champion-validation": "4", "champion-sliding": "5", "candidate": "5"
    }  # fmt: skip
    rollback(store, name)
    assert aliases(store, name)["champion"] == "2"


def test_the_best_version_of_a_rule_keeps_its_reason_and_loses_its_alias_by_a_rollback(
    store, name, register_it, tmp_path
):
    def validated(folder: str, loss: float) -> Path:
        return trained_project(tmp_path / folder, loss, rule="validation", target=1.9)

    register_it(trained_project(tmp_path / "champion"))
    best = validated("best", 1.7)
    reason = register_it(best)["reason"]
    again = register_it(best)
    assert (again["champion"], again["reason"]) == (False, "is the best version of its rule")
    assert find_version(store, name, "2").tags["verdict"] == reason
    metrics = read_json(report := best / "reports" / "metrics.json")
    write_json(report, metrics | {"validation_loss": 1.6})
    flawed = register_it(best)
    assert flawed["reason"] == "metrics.json says loss 1.6000, training measured 1.7000: evaluate again"
    write_json(report, metrics)
    assert register_it(best)["reason"] == again["reason"]
    worse = register_it(validated("worse", 1.75))["reason"]
    assert "tokens of version 2 (the best of the rule validation), whose own loss is 1.7000" in worse

    promote(store, name, "2")
    rollback(store, name)
    best_of = {"champion-sliding": "1", "champion-validation": "2"}
    assert aliases(store, name) == {"champion": "1", **best_of, "candidate": "3"}
    assert register_it(best)["reason"] == "was rolled back by hand"
    assert register_it(validated("later", 1.8))["reason"].startswith("reached the target, and there was no champion")
    assert aliases(store, name)["champion-validation"] == "4"


def test_a_rollback_leaves_the_alias_of_a_rule_with_a_better_version(store, name, register_it, tmp_path):
    def validated(folder: str, loss: float) -> Path:
        return trained_project(tmp_path / folder, loss, rule="validation", target=1.9)

    register_it(validated("1", 1.8))
    register_it(trained_project(tmp_path / "2"))
    promote(store, name, "2")
    register_it(validated("3", 1.6))  # the best of its rule, but the champion has another one
    rules = {"champion-validation": "3", "candidate": "3"}
    assert aliases(store, name) == {"champion": "2", "champion-sliding": "2", **rules}
    rollback(store, name)
    assert aliases(store, name) == {"champion": "1", "champion-sliding": "2", **rules}
    assert register_it(validated("4", 1.7))["reason"].startswith("worse: validation loss 1.7000")
    rollback(store, name)
    assert aliases(store, name) == {"champion": "2", "champion-sliding": "2", **rules, "candidate": "4"}


def test_after_learn_a_champion_of_another_rule_is_replaced_even_by_a_version_that_is_not_the_best_of_its_own(
    store, name, cheap_versions, tmp_path
):
    config = RegistryConfig(model=name, max_target_loss=0.1, replace_champion=True)
    first = trained_project(tmp_path / "1", 1.7, rule="validation", target=1.9)
    register(root_of(store), first, config)
    register(root_of(store), trained_project(tmp_path / "2"), config)
    worse = trained_project(tmp_path / "3", 1.8, rule="validation", target=1.9)
    for _ in range(2):  # the champion is registered again: it gets no alias that it did not deserve
        assert register(root_of(store), worse, config)["champion"]
        assert aliases(store, name) == {
            "champion": "3", "champion-validation": "1", "champion-sliding": "2", "candidate": "3"
        }  # fmt: skip
        assert find_version(store, name, "3").tags["passed_gate"] == "true"
    register(root_of(store), trained_project(tmp_path / "4", 0.08), config)
    done = register(root_of(store), first, config)  # the best of its rule is registered again
    assert (done["champion"], done["reason"]) == (
        True, "is the best version of its rule; it replaces champion 4, which has the rule sliding"
    )  # fmt: skip
    assert aliases(store, name)["champion"] == "1"
    assert find_version(store, name, "1").tags["verdict"] == done["reason"]


def test_the_best_version_of_its_rule_is_compared_with_a_champion_of_the_same_rule(store, name, register_it, tmp_path):
    best = trained_project(tmp_path / "1")
    register_it(best)
    store.client.delete_registered_model_alias(name, "champion")  # or a registration was killed before it was set
    assert register_it(best)["reason"] == "reached the target, and there was no champion"
    register_it(trained_project(tmp_path / "2", 0.08))
    store.client.set_registered_model_alias(name, "champion-sliding", "1")
    done = register_it(best)
    assert (done["champion"], done["reason"]) == (
        False, "worse: sliding loss 0.0900 on the tokens of champion 2, whose own loss is 0.0800"
    )  # fmt: skip
    for alias, number in (("champion", "1"), ("champion-sliding", "2")):  # as it is if `register` is killed in between
        store.client.set_registered_model_alias(name, alias, number)
    done = register_it(tmp_path / "2")
    assert (done["champion"], done["reason"]) == (
        True, "sliding loss 0.0800 on the tokens of champion 1, whose own loss is 0.0900"
    )  # fmt: skip


def test_a_champion_of_another_text_is_replaced_if_params_say_so(store, name, cheap_versions, tmp_path):
    config = RegistryConfig(model=name, max_target_loss=0.1, replace_champion=True)
    register(root_of(store), trained_project(tmp_path / "champion", n_tokens=65), config)
    done = register(root_of(store), trained_project(tmp_path / "shorter", salt=1), config, pytest.fail)
    assert (done["champion"], done["next_step"]) == (True, None)
    assert done["reason"] == "reached the target, and replaces champion 1, which has another text"
    assert aliases(store, name)["champion"] == "2"
    rollback(store, name)
    assert aliases(store, name)["champion"] == "1"


def test_losses_of_two_tokenizers_are_not_compared(store, name, register_it, tmp_path):
    register_it(trained_project(tmp_path / "champion"))
    other = trained_project(tmp_path / "other", n_tokens=65)
    (model := other / "models" / "model").joinpath("tokenizer.json").write_text("{}")
    write_manifest(model)
    done = register_it(other)
    assert (done["champion"], done["reason"]) == (
        False, "has another tokenizer than champion 1: their losses cannot be compared"
    )  # fmt: skip


def test_registering_again_keeps_a_verdict_by_hand(store, name, register_it, tmp_path):
    register_it(trained_project(tmp_path / "champion"))
    better = trained_project(tmp_path / "better", loss=0.08)
    register_it(better)
    rollback(store, name)
    again = register_it(better)
    assert (again["version"], again["champion"], again["reason"]) == ("2", False, "was rolled back by hand")
    promote(store, name, "2")
    promote(store, name, "1")  # not a rollback
    assert register_it(better)["champion"]

    unfinished = trained_project(tmp_path / "unfinished", loss=0.2)
    reason = register_it(unfinished)["reason"]
    refused = f"{name} version 3 is now champion instead of version 2, although the gate refused it: {reason}"
    assert promote(store, name, "3") == refused
    assert register_it(unfinished)["reason"] == "is the champion"
    promote(store, name, "2")
    assert promote(store, name, "3") == refused  # the verdict is kept


def test_a_forged_champion_is_not_replaced_and_the_verdict_says_why(store, name, register_it, tmp_path):
    store.client.create_registered_model(name)
    store.client.create_model_version(name, str(tmp_path), tags={"sliding_loss": "0.0"})
    store.client.set_registered_model_alias(name, "champion", "1")
    done = register_it(trained_project(tmp_path / "project"))
    assert done["reason"].endswith("champion 1 has no tag data_sha256, so `register` did not make it")
    assert aliases(store, name) == {"champion": "1", "candidate": "2"}


def test_a_store_that_is_down_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ModelMissing, match=r"127\.0\.0\.1:9 fails .* `dvc repro -f -s register`") as raised:
        register(tmp_path, trained_project(tmp_path / "project"), RegistryConfig(model="x", max_target_loss=0.1))
    assert "\n" not in str(raised.value)


def test_the_loss_on_the_champions_text_is_really_measured(store, name, cheap_versions, tmp_path, bpe):
    """All models are the same, their texts differ; the champion's own loss, here made up, decides."""
    train = yaml.safe_load((SOURCE_ROOT / "params.yaml").read_text())["train"]
    outcomes = []
    for number, champions_loss in enumerate(("5", "20", None), 1):
        project = trained_project(tmp_path / str(number), loss=0.05, n_tokens=64 + number, salt=number)
        (project / "models" / "model" / "manifest.json").unlink()
        save_small_model(project / "models" / "model", bpe, trained_length=8, fold_vocab=True)
        (project / "params.yaml").write_text(yaml.safe_dump({"train": train}))
        outcomes.append(register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1)))
        if champions_loss:  # an untrained model has about 11 nats per token
            store.client.set_model_version_tag(name, "1", "sliding_loss", champions_loss)
    assert [done["champion"] for done in outcomes] == [True, False, True]
    for done, words in zip(outcomes[1:], ("worse: sliding loss 1", "sliding loss 1"), strict=True):
        assert done["reason"].startswith(words)
        assert "on the tokens of champion 1, whose own loss is" in done["reason"]
