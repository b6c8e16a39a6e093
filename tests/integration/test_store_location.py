"""A project that was moved or copied finds its artifacts again, and the one that it was copied from is not touched."""

import os
import shutil
import sqlite3
from contextlib import closing
from uuid import uuid4

import pytest
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.config.sections import RegistryConfig
from pipeline.ops import store_location as relocation
from pipeline.ops.store_location import examine_database, relocate
from pipeline.registry.catalog import find_version, identity_of, open_registry, verify
from pipeline.registry.register import register
from pipeline.system.errors import InputError, RunLocked
from pipeline.system.files import locked
from pipeline.tracking.mlflow_store import ARTIFACTS, made_in, open_store, own_database
from pipeline.tracking.recorder import Recorder


@pytest.fixture
def registered(store, tmp_path, cheap_versions):
    """Name of a model with one version, and of the folder of the shared store."""
    name = f"model-{uuid4().hex[:8]}"
    register(root_of(store), trained_project(tmp_path / "project"), RegistryConfig(model=name, max_target_loss=0.1))
    return name, root_of(store)


@pytest.fixture
def copy(store, tmp_path):
    """A copy of the shared store's project, as `cp -a` makes it."""
    (root := tmp_path / "än other plåce").mkdir()
    with (
        closing(sqlite3.connect(root_of(store) / "mlflow.db")) as source,
        closing(sqlite3.connect(root / "mlflow.db")) as target,
    ):
        source.backup(target)
    (root / ARTIFACTS).mkdir(parents=True)
    return root


def bring_artifacts(before, root):
    shutil.copytree(before / ARTIFACTS, root / ARTIFACTS, dirs_exist_ok=True)


@pytest.mark.fault
def test_nothing_is_written_through_a_copy_that_looks_elsewhere(copy):
    for use in (lambda: Recorder(copy, copy, {}, {}), lambda: open_store(copy), lambda: open_registry(copy)):
        with pytest.raises(
            InputError, match=r"was made in .* keeps its files there: `python -m pipeline doctor --fix`"
        ):
            use()
    (finding,) = examine_database(copy)
    finding.fix()
    assert open_store(copy).uri.endswith(f"{copy}/mlflow.db")


def mentions(database, text):
    """Columns in which a value begins with `text`, wherever MLflow may have put it."""
    with closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(table, row[1]) for table in tables for row in connection.execute(f"PRAGMA table_info({table})")]
        return {
            f"{table}.{column}"
            for table, column in columns
            if connection.execute(
                f'SELECT 1 FROM "{table}" WHERE substr("{column}", 1, ?) = ?', [len(text), text]
            ).fetchone()
        }


@pytest.mark.fault
def test_a_copy_finds_its_own_files_and_the_original_keeps_its_own(registered, copy, monkeypatch):
    name, before = registered
    bring_artifacts(before, copy)
    original = (before / "mlflow.db").read_bytes()
    assert made_in(copy) == before
    (finding,) = examine_database(copy)
    assert finding.mark == "to fix"
    assert str(before) in finding.what
    assert finding.fix
    assert "below" in finding.fix()
    assert not [*examine_database(copy)]
    moved = mentions(copy / "mlflow.db", str(before))
    assert not moved, "a column that relocation.PLACES lacks"
    store = open_registry(copy)
    version = find_version(store, name, "champion")
    artifacts = copy / ARTIFACTS
    assert verify(store, version)
    assert version.source.startswith(str(artifacts))
    assert identity_of(store, version)["fingerprint"] == version.tags["fingerprint"]  # what --retrain begins with
    shutil.rmtree(artifacts)  # so it was read from here
    with pytest.raises(Exception, match="registers it again"):
        verify(store, version)
    assert (before / "mlflow.db").read_bytes() == original


@pytest.mark.fault
def test_the_database_of_before_is_kept_and_never_overwritten(registered, copy):
    _, before = registered
    database = copy / "mlflow.db"
    kept = []
    for root in (copy, before, copy):
        kept.append(database.read_bytes())
        relocate(database, made_in(copy) or copy, root)
    names = ["mlflow.db.before-relocation", "mlflow.db.before-relocation.1", "mlflow.db.before-relocation.2"]
    assert sorted(path.name for path in copy.glob("mlflow.db.*")) == names
    for name, database_before in zip(names, kept, strict=True):
        assert mentions(copy / name, str(before)) if name != names[1] else not mentions(copy / name, str(before))
        assert len((copy / name).read_bytes()) == len(database_before)


@pytest.mark.fault
@pytest.mark.parametrize(
    "lock", ["mlruns/.lock", "mlruns/.register.lock", "checkpoints/0f.lock", "checkpoints/s/0f.lock"]
)
def test_nothing_is_relocated_while_somebody_holds_the_store(copy, store, lock):
    before = (copy / "mlflow.db").read_bytes()
    with locked(copy / lock), pytest.raises(RunLocked, match=str(os.getpid())):
        relocate(copy / "mlflow.db", root_of(store), copy)
    assert (copy / "mlflow.db").read_bytes() == before
    assert not [*copy.glob("mlflow.db.*")]


@pytest.mark.fault
def test_nothing_is_relocated_while_another_program_writes(copy, store, monkeypatch):
    monkeypatch.setattr(relocation, "BUSY_S", 0.1)
    with closing(sqlite3.connect(copy / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunLocked, match=r"locked.*stop what uses it"):
            relocate(copy / "mlflow.db", root_of(store), copy)
    assert made_in(copy) == root_of(store)


@pytest.mark.fault
def test_a_kill_between_two_tables_changes_nothing(copy, store, monkeypatch):
    monkeypatch.setattr(relocation, "PLACES", (*relocation.PLACES[:2], ("experiments", "no_such_column", "TRUE")))
    with pytest.raises(sqlite3.OperationalError):
        relocate(copy / "mlflow.db", root_of(store), copy)
    assert made_in(copy) == root_of(store)
    assert not mentions(copy / "mlflow.db", str(copy))


def test_a_folder_whose_name_merely_begins_alike_is_another(copy, store):
    beside = f"{root_of(store)}-2/checkpoints/0f"
    with closing(sqlite3.connect(copy / "mlflow.db")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("INSERT INTO tags (key, value, run_uuid) VALUES ('run_folder', ?, 'x')", [beside])
        connection.commit()
    relocate(copy / "mlflow.db", root_of(store), copy)
    assert mentions(copy / "mlflow.db", beside) == {"tags.value"}


def test_without_the_artifacts_nothing_is_offered(copy, store):
    (copy / ARTIFACTS).rmdir()
    (finding,) = examine_database(copy)
    assert (finding.mark, finding.fix) == ("to fix", None)
    assert str(root_of(store) / ARTIFACTS) in finding.hint


def test_a_store_that_is_where_it_was_made_is_none_of_this(store, tmp_path):
    assert not [*examine_database(root_of(store))]
    (tmp_path / "link").symlink_to(root_of(store))
    assert made_in(tmp_path / "link") is None


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////somewhere/else/mlflow.db"])
def test_a_store_that_others_may_share_is_left_alone(copy, store, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert own_database(copy) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert own_database(copy) is None
    assert not [*examine_database(copy)]


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["no database at all" * 100, None])
def test_a_damaged_database_is_named_with_a_hint(copy, damage):
    database = copy / "mlflow.db"
    if damage:
        database.write_text(damage)
    else:
        database.write_bytes(database.read_bytes()[:20_000])  # cut short
    (finding,) = examine_database(copy)
    assert "is damaged" in finding.what
    assert str(finding.hint).startswith("move mlflow.db away")
    assert finding.fix is None


def test_a_database_in_which_someone_writes_is_not_called_damaged(copy, monkeypatch):
    monkeypatch.setattr(relocation, "BUSY_S", 0.1)
    with closing(sqlite3.connect(copy / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert relocation.flaw_of(copy / "mlflow.db") is None


def test_looking_makes_nothing(tmp_path):
    assert not [*examine_database(tmp_path)]
    (tmp_path / "mlflow.db").touch()
    assert not [*examine_database(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert (tmp_path / "mlflow.db").read_bytes() == b""
