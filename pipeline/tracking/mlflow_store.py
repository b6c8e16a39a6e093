"""Open MLflow's store of runs and models, with short timeouts and without its log messages.

Importing MLflow takes seconds: the functions that need it import it.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from pipeline.config.sections import has_password
from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

BUSY_S = 2.0  # timeout for a lock of a database
EXPERIMENT = "gpt2-to-target"  # `mlflow ui` may give the default one an artifact folder that clients cannot use
ARTIFACTS = Path("mlruns", EXPERIMENT)
SQLITE = "sqlite:///"

# Training must not wait minutes for a server, send telemetry, or print progress bars.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Store(NamedTuple):
    client: "MlflowClient"
    experiment_id: str
    uri: str


def store_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or by default the mlflow.db that `mlflow ui` opens; SQLite paths are relative to `root`.

    Raises InputError if it contains a password, since messages, tags and the page show the URI.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if has_password(uri):
        raise InputError(
            "MLFLOW_TRACKING_URI contains a password: leave it out, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD for a server, or write it to ~/.pgpass for PostgreSQL"
        )
    return f"{SQLITE}{root / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


def connect(uri: str) -> "MlflowClient":
    """A client of a store; a missing database is created."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def own_database(root: Path) -> Path | None:
    """The store's SQLite file; None if it is missing or outside the project, or if the store is not a file."""
    uri = store_uri(root)
    path = Path(uri.removeprefix(SQLITE))
    inside = uri.startswith(SQLITE) and path.resolve().is_relative_to(root.resolve())
    return path if inside and path.is_file() and path.stat().st_size else None


@contextmanager
def reading(database: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection, which does not create the file."""
    uri = f"file:{quote(str(database))}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S)) as connection:
        yield connection


def made_in(root: Path) -> Path | None:
    """The project's folder when its database was created; None if that was this folder."""
    if (database := own_database(root)) is None:
        return None
    with reading(database) as connection:
        try:
            sql = "SELECT artifact_location FROM experiments WHERE name = ?"
            row = connection.execute(sql, [EXPERIMENT]).fetchone()
        except sqlite3.DatabaseError:  # no such table, or damaged
            row = None
    place = Path(row[0]) if row and row[0] else Path()
    if not place.is_absolute() or place.parts[-2:] != ARTIFACTS.parts:  # chosen by a server or by the user
        return None
    before = place.parents[1]
    return None if before.resolve() == root.resolve() else before


def require_usable(root: Path) -> None:
    """Raise InputError if the store's URI contains a password, or if the project was moved or copied.

    The database of a copied project would make MLflow write into the original project.
    """
    if before := made_in(root):
        raise InputError(
            f"{own_database(root)} was made in {before} and keeps its files there: "
            "`python -m pipeline doctor --fix` changes it to this folder"
        )


def open_store(root: Path) -> Store:
    """Open the store; create it if it is missing.

    Raises one of `store_errors()` if it does not answer, and InputError as `require_usable` does.
    """
    require_usable(root)
    uri = store_uri(root)
    with locked(root / "mlruns" / ".lock", wait=True):  # two processes that create a database at once break it
        client = connect(uri)
        if experiment := client.get_experiment_by_name(EXPERIMENT):
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            return Store(client, experiment.experiment_id, uri)
        served = uri.startswith(("http", "databricks"))  # a server chooses the location of its artifacts
        return Store(client, client.create_experiment(EXPERIMENT, None if served else str(root / ARTIFACTS)), uri)


def all_found(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """All results of a search of MLflow's client, from all pages: one page has at most 100 or 1,000 results."""
    found = [*(page := search(*arguments))]
    while page.token:
        found += (page := search(*arguments, page_token=page.token))
    return found


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store is down, locked, slow or full."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


@contextmanager
def naming_dead_store(root: Path, hint: str = "then `dvc repro -f -s register`") -> Iterator[None]:
    """Raise ModelMissing, with a message of one line, for the store's errors."""
    try:
        yield
    except store_errors() as error:
        uri = store_uri(root)
        first = "start it or unset MLFLOW_TRACKING_URI" if uri.startswith("http") else "repair it"
        raise ModelMissing(f"MLflow's store {uri} fails ({first_line(error)}): {first}, {hint}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name if it has no message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
