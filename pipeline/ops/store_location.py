"""Update the absolute paths in MLflow's database after a project was moved or copied.

Only a SQLite file inside the project is changed, because several checkouts may share a file outside.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from pathlib import Path

from pipeline.ops.checks import Finding
from pipeline.system.errors import RunLocked
from pipeline.system.files import atomic_file, locked
from pipeline.tracking.mlflow_store import ARTIFACTS, BUSY_S, lock_of, made_in, own_database, reading, store_uri

PLACES = (  # MLflow's table, its column with paths, and the SQL condition for its rows
    ("experiments", "artifact_location", "TRUE"),
    ("runs", "artifact_uri", "TRUE"),
    ("logged_models", "artifact_location", "TRUE"),
    ("model_versions", "source", "TRUE"),
    ("model_versions", "storage_location", "TRUE"),
    ("tags", "value", "key = 'run_folder'"),
    ("trace_tags", "value", "key = 'mlflow.artifactLocation'"),
)


def examine_database(root: Path) -> Iterator[Finding]:
    """Check that the database is intact and was made in this folder."""
    if (database := own_database(root)) is None:
        return
    if flaw := flaw_of(database):
        hint = f"move {database.name} away, then `dvc repro -f -s register` makes a new one with the present model"
        yield Finding("to fix", "store", f"{database} is damaged ({flaw})", hint)
    elif before := made_in(root):
        what, hint, fix = f"{database.name} was made in {before} and contains paths there", "", None
        if (root / ARTIFACTS).is_dir():
            hint = "`python -m pipeline doctor --fix` updates its paths, and keeps a backup of the database"
            fix = partial(relocate, database, before, root)
        else:
            hint = f"move {before / ARTIFACTS} here, or {database.name} away, then `dvc repro -f -s register`"
        yield Finding("to fix", "store", what, hint, fix)


def relocate(database: Path, before: Path, root: Path) -> str:
    """Replace `before` by `root` in every path of the database, in one transaction, after a backup.

    Raises RunLocked if a training, a registration or another program is writing to the store.
    """
    locks = (root / "checkpoints").rglob("*.lock")
    with ExitStack() as stack:
        for lock in (lock_of(root, store_uri(root)), root / "mlruns" / ".register.lock", *locks):
            if lock.is_file():
                stack.enter_context(locked(lock))
        connection = stack.enter_context(closing(sqlite3.connect(database, timeout=BUSY_S, isolation_level=None)))
        try:
            connection.execute("BEGIN IMMEDIATE")  # no other process can write from here on
        except sqlite3.OperationalError as error:
            raise RunLocked(
                f"{database} cannot be written ({error}): stop the programs that use it, such as `mlflow ui`"
            ) from None
        backup = _back_up(database)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        n_paths = sum(_move(connection, *place, before, root) for place in PLACES if place[0] in tables)
        connection.execute("COMMIT")
    return f"{n_paths} paths in {database.name} are now below {root}; {backup.name} is the backup"


def flaw_of(database: Path) -> str | None:
    """The first error that SQLite finds in the file; None if it is intact."""
    try:
        with reading(database) as connection:
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        found = "ok" if "locked" in str(error) else str(error)  # a program is writing to it
    return None if found == "ok" else " ".join(found.split())


def _back_up(database: Path) -> Path:
    """Copy the database to an unused name beside it; the copy is complete or does not exist."""
    names = (database.with_name(f"{database.name}.before-relocation{f'.{i}' if i else ''}") for i in count())
    free = next(path for path in names if not path.exists())
    with (
        atomic_file(free) as unfinished,
        closing(sqlite3.connect(database)) as source,
        closing(sqlite3.connect(unfinished)) as copy,
    ):
        source.backup(copy)
    return free


def _move(connection: sqlite3.Connection, table: str, column: str, rows: str, before: Path, root: Path) -> int:
    """Replace `before` by `root` in the paths of a column that are `before` or below it; return their number."""
    sql = (
        f"UPDATE {table} SET {column} = :root || substr({column}, length(:before) + 1) "  # noqa: S608 (of PLACES)
        f"WHERE ({rows}) AND ({column} = :before OR substr({column}, 1, length(:before) + 1) = :before || '/')"
    )
    return connection.execute(sql, {"root": str(root), "before": str(before)}).rowcount
