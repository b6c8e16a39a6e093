"""relocation: MLflow's database in a moved or copied checkout -> the same with its artifacts' places set right.

MLflow notes absolute paths. Only a SQLite file inside the project is looked at: one that lies elsewhere may be shared
by several checkouts, of which only one has the artifacts.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from pipeline.ops.finding import Finding
from pipeline.system.errors import RunLocked
from pipeline.system.files import atomic_file, locked
from pipeline.tracking.mlflow_store import ARTIFACTS, BUSY_S, made_in, own_database, reading
from pipeline.tracking.recorder import RECORDER_LOCK

PLACES = (  # of MLflow's tables: column, and which rows
    ("experiments", "artifact_location", "TRUE"),
    ("runs", "artifact_uri", "TRUE"),
    ("logged_models", "artifact_location", "TRUE"),
    ("model_versions", "source", "TRUE"),
    ("model_versions", "storage_location", "TRUE"),
    ("tags", "value", "key = 'run_folder'"),
    ("trace_tags", "value", "key = 'mlflow.artifactLocation'"),
)


def examine_database(root: Path) -> Iterator[Finding]:
    """Whether the database is sound, and was made in this folder."""
    if (database := own_database(root)) is None:
        return
    if flaw := flaw_of(database):
        hint = f"move {database.name} away, then `dvc repro -f -s register` makes a new one with the present model"
        yield Finding("mend", "store", f"{database} is damaged ({flaw})", hint)
    elif before := made_in(root):
        what = f"{database.name} was made in {before} and looks for its artifacts there"
        if (root / ARTIFACTS).is_dir():
            hint = "`python -m pipeline doctor --fix` has it look here, and keeps a copy of the database as it was"
            yield Finding("mend", "store", what, hint, lambda: relocate(database, before, root))
        else:
            hint = f"move {before / ARTIFACTS} here, or {database.name} away, then `dvc repro -f -s register`"
            yield Finding("mend", "store", what, hint)


def relocate(database: Path, before: Path, root: Path) -> str:
    """Have every place below `before` in the database be one below `root`, in one transaction, after a backup.

    Raises RunLocked where a training, a registration or another program that writes has the store.
    """
    with ExitStack() as stack:
        for lock in _locks(root):
            stack.enter_context(locked(lock))
        connection = stack.enter_context(closing(sqlite3.connect(database, timeout=BUSY_S, isolation_level=None)))
        try:
            connection.execute("BEGIN IMMEDIATE")  # nobody else writes from here on
        except sqlite3.OperationalError as error:
            raise RunLocked(f"{database} cannot be written to ({error}): stop what uses it, `mlflow ui` say") from None
        kept = _backup(database)
        there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        n_rows = sum(_move(connection, *place, before, root) for place in PLACES if place[0] in there)
        connection.execute("COMMIT")
    return f"{n_rows} places in {database.name} are now below {root}; as it was, it is kept in {kept.name}"


def flaw_of(database: Path) -> str | None:
    """What SQLite finds wrong in the file."""
    try:
        with reading(database) as connection:
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        found = "ok" if "locked" in str(error) else str(error)  # by a writer
    except sqlite3.DatabaseError as error:
        found = str(error)
    return None if found == "ok" else " ".join(found.split())


def _locks(root: Path) -> list[Path]:
    """Those that are there of store, registration, runs and recorders."""
    home = root / "checkpoints"
    runs = [*home.glob("*.lock"), *home.glob("*/*.lock"), *home.glob(f"*/*/{RECORDER_LOCK}")]
    return [lock for lock in (root / "mlruns" / ".lock", root / "mlruns" / ".register.lock", *runs) if lock.is_file()]


def _backup(database: Path) -> Path:
    """A copy beside the database, under a name that is free; whole or absent."""
    first = database.with_name(f"{database.name}.before-relocation")
    names = [first, *(first.with_name(f"{first.name}.{i}") for i in range(1, 1000))]
    free = next(path for path in names if not path.exists())
    with (
        atomic_file(free) as unfinished,
        closing(sqlite3.connect(database)) as source,
        closing(sqlite3.connect(unfinished)) as copy,
    ):
        source.backup(copy)
    return free


def _move(connection: sqlite3.Connection, table: str, column: str, rows: str, before: Path, root: Path) -> int:
    """Put `root` in the place of `before` where a column's path is, or begins with, it; how often that was."""
    sql = (
        f"UPDATE {table} SET {column} = :root || substr({column}, length(:before) + 1) "  # noqa: S608 (of PLACES)
        f"WHERE ({rows}) AND ({column} = :before OR substr({column}, 1, length(:before) + 1) = :before || '/')"
    )
    return connection.execute(sql, {"root": str(root), "before": str(before)}).rowcount
