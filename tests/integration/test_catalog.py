"""The versions of a model: found, verified byte by byte, described, promoted, rolled back; never run."""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)
from mlflow.exceptions import MlflowException

from pipeline import __main__
from pipeline.config.sections import RegistryConfig
from pipeline.registry import catalog
from pipeline.registry.artifacts import fetch_version
from pipeline.registry.catalog import (
    describe_version,
    find_version,
    list_versions,
    open_registry,
    open_version,
    print_versions,
    thinned,
    verify_versions,
)
from pipeline.registry.promotion import promote, rollback
from pipeline.registry.register import register
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from pipeline.system.files import sha256_file, write_manifest


@pytest.fixture
def name() -> str:
    """A registered model that no other test has."""
    return f"model-{uuid4().hex[:8]}"


@pytest.fixture
def add(store, name, tmp_path, cheap_versions):
    """Register a tiny project as the next version; return its outcome."""

    def call(project=None, loss_on_foreign=0.0, **settings):
        project = project or trained_project(tmp_path / uuid4().hex[:8], **settings)
        call.projects.append(project)
        return register(
            root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1), lambda *_: loss_on_foreign
        )

    call.projects = []
    return call


def champion(store, name):
    return str(store.client.get_registered_model(name).aliases["champion"])


def files_of(store, name, number="1"):
    return fetch_version(store, store.client.get_model_version(name, number))


# -- finding


def test_a_version_is_found_by_its_number_and_by_its_aliases(store, name, add):
    add()
    add(corpus_loss=0.2)
    assert [str(find_version(store, name, which).version) for which in ("1", "champion", "candidate")] == [
        "1",
        "1",
        "2",
    ]
    assert [str(version.version) for version in list_versions(store, name)] == ["2", "1"]
    assert [version.aliases for version in list_versions(store, name)] == [["candidate"], ["champion"]]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("3", "has no version '3': choose one of candidate, champion, 1"),
        ("9" * 30, "has no version '999"),
        ("", "has no version '': choose one of candidate, champion, 1"),
        ("²", "has no version '²'"),
        ("nobody", "has no version 'nobody': choose one of candidate, champion, 1"),
    ],
)
def test_what_names_no_version_is_told_with_the_hint(which, words, store, name, add):  # E1
    add()
    with pytest.raises(ModelMissing) as told:
        find_version(store, name, which)
    assert words in str(told.value)


@pytest.mark.fault
def test_where_there_is_no_champion_it_is_said_how_to_make_one(store, name, add):  # E1
    add(corpus_loss=0.2)
    with pytest.raises(ModelMissing, match=r"has no version 'champion': .*`python -m pipeline models promote N` makes"):
        find_version(store, name, "champion")


@pytest.mark.fault
@pytest.mark.parametrize("look", [lambda *a: find_version(*a, "champion"), list_versions, print_versions, rollback])
def test_a_model_that_nobody_registered_is_told_with_the_command_that_makes_one(look, store, name):  # E1
    with pytest.raises(ModelMissing, match=f"no model {name} in sqlite:.*: `dvc repro` makes"):
        look(store, name)


@pytest.mark.fault
def test_where_there_is_no_store_none_is_made(tmp_path):  # E1
    with pytest.raises(ModelMissing, match=r"no MLflow store sqlite:.*run `dvc repro`"):
        open_registry(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault
@pytest.mark.parametrize("look", [open_version, describe_version, lambda s, v: promote(s, v.name, "1")])
def test_a_store_that_fails_in_the_middle_is_one_line(look, store, name, add, monkeypatch):  # E1
    add()
    version = find_version(store, name, "1")

    def down(*_arguments, **_named):
        raise MlflowException("no answer\nand much more")

    for call in ("get_model_version_download_uri", "get_run", "search_registered_models"):
        monkeypatch.setattr(type(store.client), call, down)
    with pytest.raises(ModelMissing, match=f"could not read {name}.* from .* \\(no answer\\): repair") as told:
        look(store, version)
    assert "\n" not in str(told.value)


# -- opening


def test_an_opened_version_is_whole(store, name, add):
    add()
    folder = open_version(store, find_version(store, name, "champion"))
    for place, source in (("model", "models/model"), ("tokens", "data/tokens")):
        files = {path.name: sha256_file(path) for path in (add.projects[0] / source).iterdir()}
        assert {path.name: sha256_file(path) for path in (folder / place).iterdir()} == files
    assert sha256_file(folder / "params.yaml") == sha256_file(add.projects[0] / "params.yaml")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def forge(path):
    """Alter a file and its manifest with it."""
    flip(path)
    write_manifest(path.parent)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("model/model.safetensors", flip, "is altered (SHA-256"),
        ("model/model.safetensors", forge, "manifest.json is altered (SHA-256"),
        ("model/model.safetensors", Path.unlink, "is missing"),
        ("model/manifest.json", Path.unlink, "is missing"),
        ("tokens/train-00000.bin", flip, "is altered (SHA-256"),
        ("tokens/train-00000.bin", forge, "manifest.json is altered (SHA-256"),
        ("params.yaml", flip, "is altered (SHA-256"),
        ("params.yaml", Path.unlink, "is missing"),
    ],
)
def test_an_altered_version_is_refused_by_name_and_hash(file, spoil, words, store, name, add):  # C7
    add()
    spoil(path := files_of(store, name) / file)
    with pytest.raises(IntegrityError) as told:
        open_version(store, find_version(store, name, "1"))
    assert str(told.value).startswith(f"{path.parent}")
    assert words in str(told.value)
    assert f"{name} version 1 cannot be used; `dvc repro -f -s register`" in str(told.value)
    assert "\n" not in str(told.value)


def lose(path):
    path.parent.rename(path.parent.with_name("elsewhere"))


@pytest.mark.fault
@pytest.mark.parametrize("place", ["model", "tokens", "."])
def test_a_version_whose_files_are_gone_is_missing(place, store, name, add):  # C7
    add()
    lose(files_of(store, name) / place / "file")
    with pytest.raises(ModelMissing, match=f"{name} version 1.*`dvc repro -f -s register`"):
        open_version(store, find_version(store, name, "1"))


@pytest.mark.fault
@pytest.mark.parametrize(("spoil", "error"), [(flip, IntegrityError), (forge, IntegrityError), (lose, ModelMissing)])
def test_what_is_lost_or_altered_cannot_become_champion_until_it_is_registered_again(
    spoil, error, store, name, add
):  # C7
    add()
    add(corpus_loss=0.2)
    spoil(files_of(store, name, "2") / "model" / "model.safetensors")
    with pytest.raises(error):
        promote(store, name, "2")
    assert champion(store, name) == "1"
    assert add(add.projects[1])["version"] == "3"
    promote(store, name, "3")
    assert champion(store, name) == "3"


@pytest.mark.security
@pytest.mark.parametrize("name_of_file", ["model.pkl", "model.pt", "__init__.py"])
def test_a_file_too_many_beside_the_weights_is_refused(name_of_file, store, name, add):  # C8
    add()
    (files_of(store, name) / "model" / name_of_file).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(IntegrityError, match="is not in its manifest"):
        open_version(store, find_version(store, name, "1"))


@pytest.mark.security
def test_a_version_that_the_stage_register_did_not_make_is_refused(store, name, tmp_path):  # C8
    store.client.create_registered_model(name)
    store.client.create_model_version(name, str(tmp_path))
    store.client.set_registered_model_alias(name, "champion", "1")
    with pytest.raises(IntegrityError, match=f"{name} version 1 has no hash as its tag model_sha256"):
        open_version(store, find_version(store, name, "champion"))
    with pytest.raises(ModelMissing, match=f"{name} version 1 has no run behind it"):
        describe_version(store, find_version(store, name, "champion"))


# -- promoting and rolling back


def test_a_promotion_moves_the_alias_and_says_so(store, name, add):
    add()
    add(corpus_loss=0.08)
    assert promote(store, name, "1") == f"{name} version 1 is champion now, instead of version 2"
    assert champion(store, name) == "1"
    assert promote(store, name, "champion") == f"{name} version 1 is champion already"


def test_a_promotion_past_the_gate_says_what_the_gate_said(store, name, add):
    add()
    reason = add(corpus_loss=0.2)["reason"]
    assert promote(store, name, "2").endswith(f"instead of version 1, though the gate said no: {reason}")
    assert champion(store, name) == "2"
    assert add(add.projects[1])["reason"] == "is the champion"  # which is no reason to forget
    promote(store, name, "1")
    assert promote(store, name, "2").endswith(f"though the gate said no: {reason}")


def test_the_first_champion_by_hand_takes_nobodys_place(store, name, add):
    add(corpus_loss=0.2)
    assert promote(store, name, "1").startswith(f"{name} version 1 is champion now, though the gate said no")


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_rollback_goes_to_the_champion_before_and_back_again(by_hand, store, name, add):
    add()
    add(corpus_loss=0.2 if by_hand else 0.08)
    if by_hand:
        promote(store, name, "2")
    add(corpus_loss=0.3)  # a version that never was champion
    assert rollback(store, name).startswith(f"{name} version 1 is champion now, instead of version 2")
    assert champion(store, name) == "1"
    assert rollback(store, name).startswith(f"{name} version 2 is champion now, instead of version 1")
    assert champion(store, name) == "2"


def test_registering_again_does_not_undo_a_rollback_but_a_promotion_does(store, name, add):
    add()
    better = add(corpus_loss=0.08)
    rollback(store, name)
    again = add(add.projects[1])
    assert (again["version"], again["champion"], again["reason"]) == (
        better["version"],
        False,
        "was rolled back by hand",
    )
    assert champion(store, name) == "1"
    promote(store, name, "2")
    promote(store, name, "1")  # which is no rollback
    assert add(add.projects[1])["champion"]


@pytest.mark.fault
def test_without_a_champion_before_there_is_nothing_to_roll_back_to(store, name, add):
    add()
    promote(store, name, "1")
    with pytest.raises(ModelMissing, match=f"{name} has no former champion: there is one once"):
        rollback(store, name)


@pytest.mark.fault
@pytest.mark.parametrize("deleted", [False, True])
def test_a_rollback_to_what_is_lost_or_altered_leaves_the_champion(deleted, store, name, add):  # C7
    add()
    add(corpus_loss=0.08)
    if deleted:
        store.client.delete_model_version(name, "1")
    else:
        flip(files_of(store, name) / "model" / "model.safetensors")
    with pytest.raises(ModelMissing if deleted else IntegrityError, match=r"version .?1"):
        rollback(store, name)
    assert champion(store, name) == "2"


@pytest.mark.fault
def test_killed_in_a_promotion_the_alias_is_where_it_was_or_where_it_goes(store, name, add, monkeypatch):  # C5
    class Killed(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    def killed(*_arguments, **_named):
        raise Killed

    add()
    add(corpus_loss=0.2)
    with monkeypatch.context() as crash:
        crash.setattr(type(store.client), "set_registered_model_alias", killed)
        with pytest.raises(Killed):
            promote(store, name, "2")
    assert champion(store, name) == "1"
    promote(store, name, "2")
    rollback(store, name)
    assert champion(store, name) == "1"


# -- what is printed


def test_the_table_shows_each_version_in_a_row_of_aligned_columns(store, name, add, capsys):
    add()
    add(corpus_loss=0.2, n_tokens=3000)
    for version in list_versions(store, name):
        store.client.set_model_version_tag(name, version.version, "git_commit", "0123456789abcdef")
    (add.projects[0] / "reports" / "metrics.json").unlink()
    print_versions(store, name)
    said = capsys.readouterr().out
    today, data = (
        time.strftime("%Y-%m-%d", time.gmtime()),
        [v.tags["data_sha256"][:8] for v in list_versions(store, name)],
    )
    assert said == (
        "version  aliases    corpus loss  target  steps to target  tokens to target  train tokens"
        "  data      commit    created\n"
        "2        candidate       0.2000     0.1                -                 -         3,000"
        f"  {data[0]}  01234567  {today}\n"
        "1        champion        0.0900     0.1               20               160            64"
        f"  {data[1]}  01234567  {today}\n"
    )


@pytest.mark.fault
def test_a_foreign_version_is_a_row_of_dashes_and_an_empty_model_is_told(store, name, tmp_path, capsys):
    store.client.create_registered_model(name)
    with pytest.raises(ModelMissing, match=f"{name} has no version yet: `dvc repro` makes one"):
        print_versions(store, name)
    store.client.create_model_version(name, str(tmp_path))
    print_versions(store, name)
    assert capsys.readouterr().out.splitlines()[1].split()[:7] == ["1", *["-"] * 6]


@pytest.mark.fault
def test_verify_names_what_is_wrong_with_each_version_and_the_worst_decides_the_code(store, name, add, capsys):  # C7
    for loss in (0.09, 0.2, 0.3):
        add(corpus_loss=loss)
    verify_versions(store, name)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{name} version {number}: ok" for number in (3, 2, 1)
    ]
    (folder := files_of(store, name, "1") / "model").rename(folder.with_name("elsewhere"))
    with pytest.raises(ModelMissing, match=f"not as registered: version 1 of {name}"):
        verify_versions(store, name)
    flip(files_of(store, name, "2") / "tokens" / "train-00000.bin")
    with pytest.raises(IntegrityError, match=f"not as registered: version 2, 1 of {name}"):
        verify_versions(store, name)
    lines = capsys.readouterr().out.splitlines()
    endings = ("ok, model ", "ok, model ", "is missing: ", "ok, model ", "is altered ", "is missing: ")
    for line, number, ending in zip(lines, "321321", endings, strict=True):
        assert line.startswith(f"{name} version {number}: ")
        assert ending in line


# -- describing


def test_a_description_is_what_the_run_and_the_version_say(store, name, add):
    done = add()
    store.client.log_text(done["run_id"], "ROMEO:\nO\n", "samples/step-000010.txt")
    store.client.log_text(done["run_id"], "ROMEO:\nOh\n", "samples/step-000020.txt")
    facts = describe_version(store, find_version(store, name, "champion"))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    journal = [json.loads(line) for line in (add.projects[0] / "models" / "steps.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "lr", "corpus_loss"):
        assert facts["history"][key] == [[row["step"], row[key]] for row in journal if key in row]
    assert facts["history"]["tokens_per_s"] == [[step, 16.0] for step in range(1, 21)]
    assert facts["samples"] == [{"step": 10, "text": "ROMEO:\nO"}, {"step": 20, "text": "ROMEO:\nOh"}]
    assert (facts["name"], facts["version"], facts["aliases"]) == (name, "1", ["candidate", "champion"])
    assert facts["params"] == {"registry": {"model": "x", "max_target_loss": 0.1}}
    assert facts["environment"] == {"torch": "2.13.0", "device": "cpu", "precision": "fp32", "threads": "2"}
    assert facts["metrics"] == {
        "corpus_loss": 0.09, "to_target.corpus.steps": 20, "to_target.corpus.tokens": 160, "tokens_per_s": 16.0,
    }  # fmt: skip
    assert facts["tags"]["fingerprint"] == done["fingerprint"]
    assert facts["created"] == time.strftime("%Y-%m-%d", time.gmtime())


def test_a_run_without_samples_is_described(store, name, add):
    add()
    assert describe_version(store, find_version(store, name, "1"))["samples"] == []


@pytest.mark.fault
def test_a_version_whose_run_is_gone_is_told(store, name, add, monkeypatch):
    done = add()
    version = find_version(store, name, "1")

    def gone(_client, run_id):
        raise MlflowException(f"Run '{run_id}' not found")

    monkeypatch.setattr(type(store.client), "get_run", gone)
    with pytest.raises(ModelMissing, match=f"{name} version 1 .*Run '{done['run_id']}' not found.*-s register"):
        describe_version(store, version)


@pytest.mark.parametrize("n", [0, 1, 1999, 2000, 2001, 3999, 4000, 4001, 100_000])
def test_a_curve_keeps_its_last_point_and_at_most_two_thousand(n):
    points = [[step, step / 2] for step in range(n)]
    kept = thinned(points[::-1])
    assert kept == sorted(kept)
    assert len(kept) <= 2000
    assert kept[-1:] == points[-1:]
    assert kept == points or len(kept) > 900
    assert len({b[0] - a[0] for a, b in pairwise(kept)}) <= 1


# -- the command


@pytest.fixture
def command(store, name, tmp_path, monkeypatch):
    """Run `python -m pipeline models ...`; return its exit code."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"registry": {"model": name, "max_target_loss": 0.1}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pipeline", "models", *words])
        arguments: argparse.Namespace = __main__.parse()
        return exit_code_of(lambda: arguments.command(arguments))

    return call


def test_the_command_lists_promotes_rolls_back_and_verifies(command, store, name, add, capsys):
    add()
    add(corpus_loss=0.2)
    assert command() == 0
    assert command("promote", "2") == 0
    assert champion(store, name) == "2"
    assert command("rollback") == 0
    assert champion(store, name) == "1"
    assert command("verify") == command("verify", "champion") == 0
    flip(files_of(store, name, "2") / "model" / "model.safetensors")
    assert command("verify", "1") == 0
    assert command("verify") == command("verify", "2") == command("promote", "2") == 3
    assert command("verify", "7") == 7
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4  # a line for each
    assert all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize(
    "words",
    [("promote",), ("list", "1"), ("rollback", "1"), ("verify", "--retrain"), ("promote", "1", "--retrain")],
)
def test_the_command_refuses_what_makes_no_sense_before_it_opens_anything(words, command, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "open_registry", None)
    assert command(*words) == InputError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
