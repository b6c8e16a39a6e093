"""The doctor on real folders and MLflow stores: altered versions, and a copied project."""

import shutil
import sqlite3
from contextlib import closing
from functools import partial
from uuid import uuid4

import pytest
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.config.sections import RegistryConfig
from pipeline.ops.doctor import ErrorsLeft, examine, examine_store, examine_versions
from pipeline.ops.store_location import examine_database
from pipeline.registry.artifacts import fetch_version
from pipeline.registry.catalog import find_version, identity_of, open_registry, verify
from pipeline.registry.register import register
from pipeline.system.errors import InputError, ModelMissing
from pipeline.tracking.mlflow_store import ARTIFACTS, store_uri


def test_a_bare_folder_gets_a_line_for_each_check_and_stays_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErrorsLeft):
        examine(tmp_path, fix=True)
    topics = [line[8:].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert topics == [".venv", "packages", "git", "dvc", "git", "params", "store"]
    assert not [*tmp_path.iterdir()]


def test_a_server_that_is_down_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # no server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ModelMissing, match=r"^MLflow's store http://127.0.0.1:9 fails \(.*start it.*then repeat$"):
        list(examine_store(tmp_path))
    assert not [*tmp_path.iterdir()]


def add_version(store, name, project):
    register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))


def test_altered_and_missing_versions_of_all_models_are_named(store, tmp_path, cheap_versions, monkeypatch):
    search = partial(store.client.search_registered_models, max_results=1)  # many pages
    monkeypatch.setattr(store.client, "search_registered_models", search)
    altered, lost, foreign = (f"model-{uuid4().hex[:8]}" for _ in range(3))
    for i, name in enumerate((altered, altered, lost)):
        add_version(store, name, trained_project(tmp_path / str(i), salt=i))
    store.client.create_registered_model(foreign)  # not by `register`
    store.client.create_model_version(foreign, "/nowhere")

    found = list(examine_store(root_of(store)))
    assert (found[0].mark, found[0].what) == ("ok", f"{store_uri(root_of(store))} answers")
    assert {"runs", "journals", "versions"} <= {finding.topic for finding in found}
    intact = found[-1].what
    assert all(version in intact for version in (f"{altered} 1", f"{altered} 2", f"{lost} 1"))

    def weights(name):
        return fetch_version(store, store.client.get_model_version(name, "1")) / "model" / "model.safetensors"

    weights(altered).write_bytes(b"weightS\0")
    shutil.rmtree(weights(lost).parent)
    *faults, last = examine_versions(store)
    for name, words in ((altered, "is altered"), (lost, "is missing")):
        (finding,) = [finding for finding in faults if f"{name} version" in finding.what]
        assert finding.mark == "to fix"
        assert words in finding.what
        assert "dvc repro -f -s register" in finding.what
    assert f"{altered} 2" in last.what
    assert f"{altered} 1" not in last.what
    assert not [finding for finding in (*faults, last) if foreign in finding.what]


def columns_with(database, start):
    """All columns of the database in which a value begins with `start`."""
    with closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(table, row[1]) for table in tables for row in connection.execute(f"PRAGMA table_info({table})")]
        query = 'SELECT 1 FROM "{}" WHERE substr("{}", 1, ?) = ?'
        return {
            f"{table}.{column}"
            for table, column in columns
            if connection.execute(query.format(table, column), [len(start), start]).fetchone()
        }


def test_a_copy_finds_its_own_files_and_the_original_is_not_changed(store, tmp_path, cheap_versions):
    name, before = f"model-{uuid4().hex[:8]}", root_of(store)
    add_version(store, name, trained_project(tmp_path / "project"))
    copy = tmp_path / "än other plåce"
    shutil.copytree(before / ARTIFACTS, copy / ARTIFACTS)
    with (
        closing(sqlite3.connect(before / "mlflow.db")) as source,
        closing(sqlite3.connect(copy / "mlflow.db")) as target,
    ):
        source.backup(target)
    original = (before / "mlflow.db").read_bytes()
    with pytest.raises(InputError, match="keeps its files there"):
        open_registry(copy)
    (finding,) = examine_database(copy)
    finding.fix()
    assert not [*examine_database(copy)]
    assert not columns_with(copy / "mlflow.db", str(before)), "a column that store_location.PLACES lacks"
    copied = open_registry(copy)
    version = find_version(copied, name, "champion")
    assert version.source.startswith(str(copy / ARTIFACTS))
    assert verify(copied, version)
    assert identity_of(copied, version)["fingerprint"] == version.tags["fingerprint"]  # `verify --retrain` reads it
    shutil.rmtree(copy / ARTIFACTS)  # the original's files are still there
    with pytest.raises(ModelMissing, match="registers it again"):
        verify(copied, version)
    assert (before / "mlflow.db").read_bytes() == original
