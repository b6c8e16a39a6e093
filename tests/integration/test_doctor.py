"""What `python -m pipeline doctor` says of a project, what it fixes, and that it leaves no trace of its own."""

from functools import partial
from uuid import uuid4

import pytest
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.__main__ import main
from pipeline.config.sections import RegistryConfig
from pipeline.ops import doctor
from pipeline.ops.checks import Finding
from pipeline.ops.doctor import NotWell, examine, examine_store, examine_versions
from pipeline.registry.artifacts import fetch_version
from pipeline.registry.register import register
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import InputError, RunLocked
from pipeline.tracking.mlflow_store import store_uri

CHECKS = [f"examine_{what}" for what in ("packages", "tools", "params", "store")]  # in their order


@pytest.fixture
def find(monkeypatch):
    """Have the checks find just these, in the first of them."""

    def replace(*findings):
        for name in CHECKS:
            monkeypatch.setattr(doctor, name, lambda _: iter(()))
        monkeypatch.setattr(doctor, CHECKS[0], lambda _: iter(findings))

    return replace


def test_a_line_has_its_columns_and_its_hint():
    assert str(Finding("ok", "git", "at commit x")) == "ok      git        at commit x"
    assert str(Finding("to fix", "temporary", "two\nlines", "fix it")) == "to fix  temporary  two lines: fix it"


def test_all_well_is_exit_code_0(find, tmp_path, capsys):
    find(Finding("ok", "x", "well"), Finding("note", "y", "worth knowing", "do it"))
    assert exit_code_of(lambda: examine(tmp_path, fix=True)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      x          well",
        "note    y          worth knowing: do it",
    ]


@pytest.mark.fault
def test_without_fix_all_is_named_nothing_is_fixed_and_the_code_is_1(find, tmp_path, capsys):
    find(Finding("to fix", "x", "a", "b", lambda: 1 / 0), Finding("to fix", "y", "c", "d"))
    assert exit_code_of(lambda: examine(tmp_path, fix=False)) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["to fix  x          a: b", "to fix  y          c: d"]
    assert said.err == "error: 2 to fix, see above; `python -m pipeline doctor --fix` fixes 1 of them\n"


@pytest.mark.fault
def test_with_fix_what_is_fixed_counts_no_more(find, tmp_path, capsys):
    find(Finding("to fix", "x", "a", "b", lambda: "done"))
    examine(tmp_path, fix=True)
    assert capsys.readouterr().out == "fixed   x          done\n"


@pytest.mark.fault
@pytest.mark.parametrize("error", [RunLocked("held by process 7"), PermissionError(13, "not yours")])
def test_a_fix_that_fails_is_still_to_fix(find, tmp_path, capsys, error):
    def fail():
        raise error

    find(Finding("to fix", "x", "a", "b", fail))
    with pytest.raises(NotWell, match=r"^1 to fix, see above$"):
        examine(tmp_path, fix=True)
    assert capsys.readouterr().out == f"to fix  x          a; not fixed: {error}\n"


@pytest.mark.fault
@pytest.mark.parametrize("error", [InputError("MLFLOW_TRACKING_URI is odd"), PermissionError(13, "not yours")])
def test_a_check_that_fails_is_a_line_and_the_others_go_on(find, tmp_path, capsys, monkeypatch, error):
    def examine_one(root):
        yield Finding("ok", "x", "the first")
        raise error

    find()
    monkeypatch.setattr(doctor, CHECKS[0], examine_one)
    monkeypatch.setattr(doctor, CHECKS[-1], lambda _: iter([Finding("ok", "z", "the last")]))
    with pytest.raises(NotWell):
        examine(tmp_path, fix=False)
    first, failed, last = capsys.readouterr().out.splitlines()
    assert (first.split()[1], last.split()[1]) == ("x", "z")
    assert failed.startswith("to fix  one ")
    assert str(error) in failed


def test_a_bare_folder_gets_a_line_about_everything_and_nothing_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotWell):
        examine(tmp_path, fix=False)
    topics = {line[8:].split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"packages", "git", "params", "store"} <= topics
    assert not [*tmp_path.iterdir()]


def test_an_empty_database_is_not_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").touch()
    (finding,) = examine_store(tmp_path)
    assert finding.mark == "note"
    assert (tmp_path / "mlflow.db").read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.fault
def test_a_store_whose_address_is_refused_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:secret@host/x")
    (finding,) = doctor._findings(examine_store, tmp_path)
    assert finding.mark == "to fix"
    assert "secret" not in finding.what


@pytest.mark.fault
def test_a_dead_server_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in CHECKS:
        if name != "examine_store":
            monkeypatch.setattr(doctor, name, lambda _: iter(()))
    with pytest.raises(NotWell):
        examine(tmp_path, fix=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("to fix  store      MLflow's store http://127.0.0.1:9 fails (")
    assert not [*tmp_path.iterdir()]


def test_a_store_that_is_there_gets_its_lines(store):
    found = list(examine_store(root_of(store)))
    assert (found[0].mark, found[0].what) == ("ok", f"{store_uri(root_of(store))} answers")
    assert {"runs", "journals", "versions"} <= {finding.topic for finding in found}


@pytest.mark.fault
@pytest.mark.parametrize(("fault", "words"), [("alter", "is altered"), ("remove", "is missing")])
def test_a_version_whose_files_are_altered_or_gone_is_named_with_the_cure(
    store, tmp_path, cheap_versions, fault, words
):
    name = f"model-{uuid4().hex[:8]}"
    for salt in range(2):
        project = trained_project(tmp_path / str(salt), salt=salt)
        register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1), lambda *_: 0.0)
    assert f"{name} 1" in [*examine_versions(store)][-1].what
    weights = fetch_version(store, store.client.get_model_version(name, "1")) / "model" / "model.safetensors"
    weights.write_bytes(b"weightS\0") if fault == "alter" else weights.unlink()
    found = [finding for finding in examine_versions(store) if f"{name} version" in finding.what]
    assert [finding.mark for finding in found] == ["to fix"]
    assert words in found[0].what
    assert "dvc repro -f -s register" in found[0].what
    assert f"{name} 2" in [*examine_versions(store)][-1].what


def test_every_model_is_looked_at(store, tmp_path, cheap_versions, monkeypatch):
    project, names = trained_project(tmp_path), [f"model-{uuid4().hex[:8]}" for _ in range(2)]
    for name in names:
        register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1), lambda *_: 0.0)
    search = partial(store.client.search_registered_models, max_results=1)  # at a time; by itself, a hundred
    monkeypatch.setattr(store.client, "search_registered_models", search)
    assert all(f"{name} 1" in [*examine_versions(store)][-1].what for name in names)


def test_a_version_that_no_register_made_is_none_of_ours(store):
    name = f"model-{uuid4().hex[:8]}"
    store.client.create_registered_model(name)
    store.client.create_model_version(name, "/nowhere")
    assert not [finding for finding in examine_versions(store) if name in finding.what]


@pytest.mark.parametrize("arguments", [[], ["--fix"]])
def test_the_command_passes_on_whether_to_fix(monkeypatch, arguments):
    called = []
    monkeypatch.setattr(doctor, "examine", lambda root, fix: called.append(fix))
    assert main(["doctor", *arguments]) == 0
    assert called == [bool(arguments)]
