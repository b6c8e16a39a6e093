"""Open MLflow's store of runs and models, with short timeouts and without its log messages.

Importing MLflow takes seconds: the functions that need it import it.
"""

import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from pipeline.config.sections import has_password
from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import locked
from pipeline.tracking.mlflow_errors import explain

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

BUSY_S = 2.0  # timeout for a lock of a database
CONNECT_S = 10  # timeout for a connection to a database
FILES_S = 600  # timeout for a request that sends or fetches a file of a model
EXPERIMENT = "gpt2-to-target"  # `mlflow ui` may give the default one an artifact folder that clients cannot use
ARTIFACTS = Path("mlruns", EXPERIMENT)
SQLITE = "sqlite:///"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # schemes of MLflow, before the driver's name

# Training must not wait minutes for a server, send telemetry, or print progress bars.
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    TIMEOUT: "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_transfer = threading.Lock()  # held while the timeout is FILES_S


class Store(NamedTuple):
    client: "MlflowClient"
    experiment_id: str
    uri: str


def store_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or by default the mlflow.db that `mlflow ui` opens; SQLite paths are relative to `root`.

    Raises InputError if it is not the URI of a server or a database, if MLflow would read a SQLite path as another one,
    or if it contains a password, since messages, tags and the page show the URI.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"{SQLITE}mlflow.db"
    if not _is_supported(uri):
        raise InputError(
            f"MLFLOW_TRACKING_URI {uri} is neither a server nor a database: write http://HOST:PORT or sqlite:///FILE "
            "(MLflow 3 does not read folders: `mlflow migrate-filestore` makes a database of one)"
        )
    if has_password(uri):
        raise InputError(
            "MLFLOW_TRACKING_URI contains a password: leave it out, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD for a server, or write it to ~/.pgpass for PostgreSQL"
        )
    if not uri.startswith(SQLITE):
        return uri
    path = str(root / uri.removeprefix(SQLITE))
    if unquote(path) != path or "?" in path:  # in a URL, %20 and ? mean something else
        raise InputError(f"MLflow cannot open {path}, a path with %XX or `?`: rename it, or set MLFLOW_TRACKING_URI")
    return f"{SQLITE}{path}"


def _is_supported(uri: str) -> bool:
    """Whether MLflow can have a store at this URI; plugins of MLflow have schemes of their own."""
    try:
        scheme, host = urlsplit(uri).scheme, urlsplit(uri).hostname
        _ = urlsplit(uri).port  # raises ValueError for an impossible one
    except ValueError:
        return False
    if scheme in ("", "file"):
        return uri == "databricks" or os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    if scheme in ("http", "https"):
        return host is not None and uri.startswith(scheme)
    return uri.startswith(SQLITE) if scheme == "sqlite" else not re.match(r"[\w.-]+:\d+(/|$)", uri)  # HOST:PORT


def connect(uri: str) -> "MlflowClient":
    """A client of a store; a missing database is created.

    Raises InputError for a database that MLflow would change: one of another MLflow version or of another program; and
    for a timeout in the environment that is not a number.
    """
    for name, value in MLFLOW_DEFAULTS.items():
        given = os.environ.setdefault(name, value)
        if value.isdecimal() and not given.isdecimal():
            raise InputError(f"{name} is {given!r}: set it to a whole number, or unset it")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.partition(":")[0].partition("+")[0] in DATABASES:
        _require_own_schema(uri)
    return MlflowClient(uri)


@contextmanager
def long_timeout() -> Iterator[None]:
    """Give each request of MLflow FILES_S, unless the user has chosen a timeout.

    A server that keeps files in another store answers only after it has sent or fetched the whole file. MLflow reads
    the timeout from the environment, so one thread after the other has this context.
    """
    with _transfer:
        if is_default := os.environ.get(TIMEOUT) == MLFLOW_DEFAULTS[TIMEOUT]:
            os.environ[TIMEOUT] = str(FILES_S)
        try:
            yield
        finally:
            if is_default:
                os.environ[TIMEOUT] = MLFLOW_DEFAULTS[TIMEOUT]


def _require_own_schema(uri: str) -> None:
    """Raise InputError if a database with tables has not this MLflow's schema.

    MLflow itself adds its tables to any database, and upgrades older ones, which older versions then cannot read.
    """
    import mlflow
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import NullPool, create_engine, inspect, text

    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).parent.is_dir():
        return  # MLflow creates the folder
    option = "timeout" if uri.startswith("sqlite") else "connect_timeout"  # sqlite's: for another process's lock
    options = {} if uri.startswith("mssql") else {option: CONNECT_S}
    with create_engine(uri, poolclass=NullPool, connect_args=options).connect() as connection:
        tables = {*inspect(connection).get_table_names()}
        found = {*MigrationContext.configure(connection).get_current_heads()}
        is_mlflow = {"experiments", "runs", "metrics"} <= tables
        in_use = is_mlflow and connection.execute(text("SELECT 1 FROM experiments")).first() is not None
    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if found == {script.get_current_head()} or not tables:
        return
    if not is_mlflow:
        raise InputError(
            f"{uri} is a database of another program (its tables: {', '.join(sorted(tables)[:3])}, ...): "
            "set MLFLOW_TRACKING_URI to a new file or an empty database"
        )
    schema = f"its schema is {', '.join(sorted(found)) or 'the first one'}"
    if not found <= {revision.revision for revision in script.walk_revisions()}:
        raise InputError(
            f"{uri} is not of MLflow {mlflow.__version__}, but of a newer one or of another program ({schema}): "
            "install that MLflow, or set MLFLOW_TRACKING_URI to another database"
        )
    if in_use:  # else a process was killed while it created the tables: MLflow completes them
        raise InputError(
            f"{uri} was made by an older MLflow than {mlflow.__version__} ({schema}): back it up, then "
            f"`mlflow db upgrade {uri}`, after which older versions cannot read it"
        )


def find_experiment(client: "MlflowClient") -> "Experiment | None":
    """The project's experiment; None if the store lacks it. Raises ConnectionError if it is not MLflow that answers."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None and experiment.name != EXPERIMENT:
        raise ConnectionError("the answers are not those of MLflow")
    return experiment


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


def lock_of(root: Path, uri: str) -> Path:
    """The file that is locked while the store may be created.

    It is beside a SQLite file, so that projects that share the file share its lock; in the project if this user cannot
    write there, and so cannot create the store.
    """
    database = Path(uri.removeprefix(SQLITE)).resolve()
    if uri.startswith(SQLITE) and (os.access(database.parent, os.W_OK) or not database.parent.exists()):
        return database.with_name(f"{database.name}.lock")
    return root / "mlruns" / ".lock"


@contextmanager
def _exclusive(root: Path, uri: str) -> Iterator[None]:
    """Hold a lock while the store may be created: two processes that create a database at once break it.

    A server needs no lock, so the folder may be read-only. PostgreSQL has a lock for the clients of all machines.
    """
    if _is_served(uri):
        yield
    elif uri.startswith("postgresql"):
        from sqlalchemy import NullPool, create_engine, text

        options = {"connect_timeout": CONNECT_S}
        with create_engine(uri, poolclass=NullPool, connect_args=options).connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(hashtext('mlflow'))"))  # ends with the connection
            yield
    else:
        with locked(lock_of(root, uri), wait=True):
            yield


def _is_served(uri: str) -> bool:
    return uri.startswith(("http", "databricks"))


def open_store(root: Path) -> Store:
    """Open the store; create it if it is missing.

    Raises one of `store_errors()` if it does not answer, and InputError as `require_usable` and `connect` do.
    """
    from mlflow.exceptions import MlflowException

    require_usable(root)
    uri = store_uri(root)
    with _exclusive(root, uri):
        client = connect(uri)
        if (experiment := find_experiment(client)) is None:
            location = None if _is_served(uri) else str(root / ARTIFACTS)  # a server chooses that of its artifacts
            try:
                return Store(client, client.create_experiment(EXPERIMENT, location), uri)
            except MlflowException:
                if (experiment := find_experiment(client)) is None:  # not created by another client at this moment
                    raise
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return Store(client, experiment.experiment_id, uri)


def all_found(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """All results of a search of MLflow's client, from all pages: one page has at most 100 or 1,000 results."""
    found = [*(page := search(*arguments))]
    while page.token:
        found += (page := search(*arguments, page_token=page.token))
    return found


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store is down, locked, slow, full or of another kind, or lacks a package."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, ImportError


@contextmanager
def translate_store_errors(
    uri: str, what: str = "", remedy: str = "repair it", hint: str = "then repeat"
) -> Iterator[None]:
    """Raise ModelMissing, with a message of one line, for the errors of the store at `uri`.

    `what`: what is read or changed, such as a version; `remedy`: what to do if the cause is not known; `hint`: what to
    do after that.
    """
    try:
        yield
    except store_errors() as error:
        cause, known = explain(error)
        found = f"{what}: {cause}" if what else cause
        raise ModelMissing(f"MLflow's store {uri} fails ({found}): {known or remedy}, {hint}") from error
