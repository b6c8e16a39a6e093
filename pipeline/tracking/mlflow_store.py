"""Open MLflow's store of runs and models, quietly and with bounded waiting.

Importing MLflow takes seconds, so that it is imported by the functions that need it, never with this module.
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

BUSY_S = 2.0  # how long to wait for another writer of a database
EXPERIMENT = "gpt2-to-target"  # of our own: `mlflow ui` may give the default one a place that clients cannot write to
ARTIFACTS = Path("mlruns", EXPERIMENT)
SQLITE = "sqlite:///"

# Training must not wait minutes for a server, send telemetry, or print progress bars into its own lines.
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


def project_root() -> Path:
    """The repository that keeps checkpoints and store, also from within the copies of `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT", "")).absolute()


def store_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the mlflow.db that a bare `mlflow ui` opens; relative SQLite files are `root`'s.

    Raises InputError where it holds a password, which messages, tags and the page would show.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if has_password(uri):
        raise InputError(
            "MLFLOW_TRACKING_URI holds a password: leave it out, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD for a server, or write it to ~/.pgpass for PostgreSQL"
        )
    return f"{SQLITE}{root / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


def connect(uri: str) -> "MlflowClient":
    """A client of a store; a database that is missing is created."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def own_database(root: Path) -> Path | None:
    """The store's SQLite file; None where the store is none, or the file is missing or lies outside of the project."""
    uri = store_uri(root)
    path = Path(uri.removeprefix(SQLITE))
    inside = uri.startswith(SQLITE) and path.resolve().is_relative_to(root.resolve())
    return path if inside and path.is_file() and path.stat().st_size else None


@contextmanager
def reading(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that neither creates nor changes the file."""
    uri = f"file:{quote(str(database))}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S)) as connection:
        yield connection


def made_in(root: Path) -> Path | None:
    """The other folder in which the project was when its database was created; None where it was this one."""
    if (database := own_database(root)) is None:
        return None
    with reading(database) as connection:
        try:
            sql = "SELECT artifact_location FROM experiments WHERE name = ?"
            row = connection.execute(sql, [EXPERIMENT]).fetchone()
        except sqlite3.DatabaseError:  # no such table, or damaged
            row = None
    place = Path(row[0]) if row and row[0] else Path()
    if not place.is_absolute() or place.parts[-2:] != ARTIFACTS.parts:  # a server's, or one that a user chose
        return None
    before = place.parents[1]
    return None if before.resolve() == root.resolve() else before


def require_usable(root: Path) -> None:
    """Raise InputError for an address with a password, and for the database of a moved or copied project.

    That one would write into the project that it was copied from.
    """
    if before := made_in(root):
        raise InputError(
            f"{own_database(root)} was made in {before} and keeps its files there: "
            "`python -m pipeline doctor --fix` makes it use this folder"
        )


def open_store(root: Path) -> Store:
    """Open the store, and create it where it is missing.

    Raises one of `store_errors()` where it does not answer, InputError as `require_usable` does.
    """
    require_usable(root)
    uri = store_uri(root)
    with locked(root / "mlruns" / ".lock", wait=True):  # processes that create one database together break it
        client = connect(uri)
        if experiment := client.get_experiment_by_name(EXPERIMENT):
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            return Store(client, experiment.experiment_id, uri)
        served = uri.startswith(("http", "databricks"))  # a server knows where it keeps artifacts
        return Store(client, client.create_experiment(EXPERIMENT, None if served else str(root / ARTIFACTS)), uri)


def all_found(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """All that a search of MLflow's client finds, page by page: by itself it ends at a hundred, or a thousand."""
    found = [*(page := search(*arguments))]
    while page.token:
        found += (page := search(*arguments, page_token=page.token))
    return found


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow lets through when its store is down, locked, slow or full."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


@contextmanager
def naming_dead_store(root: Path, hint: str = "then `dvc repro -f -s register`") -> Iterator[None]:
    """Turn the store's errors into a ModelMissing of one line."""
    try:
        yield
    except store_errors() as error:
        uri = store_uri(root)
        first = "start it or unset MLFLOW_TRACKING_URI" if uri.startswith("http") else "repair it"
        raise ModelMissing(f"MLflow's store {uri} fails ({first_line(error)}): {first}, {hint}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
