"""The paths in a moved project's database are updated in one transaction, after a backup, and only inside the project.

The databases have some of MLflow's tables; tests/integration/test_doctor.py uses MLflow's own.
"""

import os
import shutil
import sqlite3
from contextlib import closing

import pytest

from pipeline.ops import store_location
from pipeline.ops.store_location import examine_database, flaw_of, relocate
from pipeline.system.errors import InputError, RunLocked
from pipeline.system.files import locked
from pipeline.tracking import mlflow_store
from pipeline.tracking.mlflow_store import ARTIFACTS, EXPERIMENT, made_in, open_store, own_database
from pipeline.tracking.recorder import Recorder


@pytest.fixture
def before(tmp_path):
    """A project with a database that was made in it."""
    root = tmp_path / "än old plåce"
    (root / ARTIFACTS).mkdir(parents=True)
    with closing(sqlite3.connect(root / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE experiments (name, artifact_location)")
        connection.execute("INSERT INTO experiments VALUES (?, ?)", [EXPERIMENT, str(root / ARTIFACTS)])
        connection.execute("CREATE TABLE tags (key, value)")
        runs = [("run_folder", str(root / "checkpoints" / f"{i}")) for i in range(999)]
        others = [("note", f"{root}/x"), ("run_folder", f"{root}-2/checkpoints/0f")]  # not a path, not in the project
        connection.executemany("INSERT INTO tags VALUES (?, ?)", [*others, *runs])
        connection.commit()
    return root


@pytest.fixture
def copy(before, tmp_path):
    """A copy of the project, in another folder."""
    return shutil.copytree(before, tmp_path / "new")


def content(database):
    with closing(sqlite3.connect(database)) as connection:
        return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in ("experiments", "tags")]


def test_a_copy_is_refused_until_its_paths_are_updated(before, copy):
    for use in (lambda: Recorder(copy), lambda: open_store(copy)):
        with pytest.raises(
            InputError, match=r"was made in .* keeps its files there: `python -m pipeline doctor --fix`"
        ):
            use()
    (finding,) = examine_database(copy)
    assert (finding.mark, str(before) in finding.what) == ("to fix", True)
    assert finding.fix().startswith("1000 paths in mlflow.db are now below ")
    assert not [*examine_database(copy)]
    places, (note, elsewhere, first, *_) = content(copy / "mlflow.db")
    assert places == [(EXPERIMENT, str(copy / ARTIFACTS))]
    assert first == ("run_folder", str(copy / "checkpoints" / "0"))
    assert [note, elsewhere] == content(before / "mlflow.db")[1][:2]

    relocate(copy / "mlflow.db", copy, before)
    backups = [copy / "mlflow.db.before-relocation", copy / "mlflow.db.before-relocation.1"]
    assert sorted(copy.glob("mlflow.db.*")) == backups  # the first one was not overwritten
    assert [content(backup)[0] for backup in backups] == [content(before / "mlflow.db")[0], places]


def test_a_store_in_use_is_neither_changed_nor_called_damaged(before, copy, monkeypatch):
    for lock in ("mlflow.db.lock", "mlruns/.register.lock", "checkpoints/0f.lock", "checkpoints/study/0f.lock"):
        with locked(copy / lock), pytest.raises(RunLocked, match=str(os.getpid())):
            relocate(copy / "mlflow.db", before, copy)
    for module in (store_location, mlflow_store):
        monkeypatch.setattr(module, "BUSY_S", 0.1)
    with closing(sqlite3.connect(copy / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RunLocked, match=r"locked.*stop the programs that use it"):
            relocate(copy / "mlflow.db", before, copy)
        assert flaw_of(copy / "mlflow.db") is None
    assert (copy / "mlflow.db").read_bytes() == (before / "mlflow.db").read_bytes()
    assert not [*copy.glob("mlflow.db.before*")]


def test_a_failure_between_two_tables_changes_nothing(before, copy, monkeypatch):
    failing = ("tags", "no_such_column", "TRUE")
    monkeypatch.setattr(store_location, "PLACES", (*store_location.PLACES[:1], failing))
    with pytest.raises(sqlite3.OperationalError):
        relocate(copy / "mlflow.db", before, copy)
    assert content(copy / "mlflow.db") == content(before / "mlflow.db")


def test_without_the_artifacts_there_is_a_hint_but_no_fix(before, copy):
    (copy / ARTIFACTS).rmdir()
    (finding,) = examine_database(copy)
    assert (finding.mark, finding.fix) == ("to fix", None)
    assert str(before / ARTIFACTS) in finding.hint


def test_a_store_in_its_own_folder_or_outside_the_project_has_no_finding(before, copy, tmp_path, monkeypatch):
    assert not [*examine_database(before)]
    (tmp_path / "link").symlink_to(before)
    assert made_in(tmp_path / "link") is None
    for uri in ("http://127.0.0.1:9", f"sqlite:///{before / 'mlflow.db'}"):  # others may share them
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert own_database(copy) is None
        assert not [*examine_database(copy)]


@pytest.mark.parametrize("damage", [lambda content: b"no database" * 100, lambda content: content[: len(content) // 2]])
def test_a_damaged_database_is_named_with_a_hint(copy, damage):
    (copy / "mlflow.db").write_bytes(damage((copy / "mlflow.db").read_bytes()))
    (finding,) = examine_database(copy)
    assert "is damaged" in finding.what
    assert str(finding.hint).startswith("move mlflow.db away")
    assert finding.fix is None
