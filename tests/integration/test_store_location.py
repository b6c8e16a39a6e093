"""A copied project finds its own artifacts in a real MLflow store, and the original project is not changed."""

import shutil
import sqlite3
from contextlib import closing
from uuid import uuid4

import pytest
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.config.sections import RegistryConfig
from pipeline.ops.store_location import examine_database
from pipeline.registry.catalog import find_version, identity_of, open_registry, verify
from pipeline.registry.register import register
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from pipeline.tracking.mlflow_store import ARTIFACTS


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
    register(before, trained_project(tmp_path / "project"), RegistryConfig(model=name, max_target_loss=0.1))
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
    shutil.rmtree(copy / ARTIFACTS)  # so that the files of before would be read, if any
    with pytest.raises((IntegrityError, ModelMissing), match="registers it again"):
        verify(copied, version)
    assert (before / "mlflow.db").read_bytes() == original
