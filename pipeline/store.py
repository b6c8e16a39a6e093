"""store: where MLflow keeps runs and models -> a client, opened once, quietly, with bounded waiting.

Importing MLflow takes seconds, so that it is imported by the functions that need it, never with this module.
"""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import ModelMissing
from pipeline.files import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "gpt2-to-target"  # of our own: `mlflow ui` may give the default one a place that clients cannot write to

# Training must not wait minutes for a server, tell a stranger that it runs, or draw bars into its own lines.
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
    """The repository that keeps checkpoints and store, seen also from the throw-away copies of `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT", "")).absolute()


def store_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the mlflow.db that a bare `mlflow ui` looks for; relative SQLite files are `root`'s."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{root / path}" if uri.startswith("sqlite:///") else uri


def open_store(root: Path) -> Store:
    """Open the store, made by the first that needs it. Raises one of `store_errors()` where it does not answer."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = store_uri(root)
    served = uri.startswith(("http", "databricks"))
    with locked(root / "mlruns" / ".lock", wait=True):  # processes that make one database together break it
        client = MlflowClient(uri)
        if experiment := client.get_experiment_by_name(EXPERIMENT):
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            return Store(client, experiment.experiment_id, uri)
        artifacts = None if served else str(root / "mlruns" / EXPERIMENT)  # a server knows where it keeps them
        return Store(client, client.create_experiment(EXPERIMENT, artifacts), uri)


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow lets through when its store is down, locked, slow or full."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


@contextmanager
def naming_dead_store(root: Path, cure: str = "then `dvc repro -f -s register`") -> Iterator[None]:
    """Turn the store's errors into a ModelMissing of one line."""
    try:
        yield
    except store_errors() as error:
        raise ModelMissing(f"MLflow's store {store_uri(root)} fails ({first_line(error)}): mend it, {cure}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def git_facts() -> dict[str, str]:
    """Commit of the working directory, and whether anything but DVC's own outputs differs from it."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!reports")
    clean = "unknown" if commit is None or changes is None else str(not changes).lower()
    return {"git_commit": commit or "unknown", "tree_clean": clean}


def machine_facts() -> dict[str, Any]:
    """Python, platform, processor and the installed packages."""
    packages = sorted(f"{package.name}=={package.version}" for package in metadata.distributions())
    return {"python": sys.version, "platform": platform.platform(), "cpu": _cpu_name(), "packages": packages}


def _git(*arguments: str) -> str | None:
    """What git prints, None where it fails: no git, no repository, no commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
