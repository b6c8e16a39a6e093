"""The store's URI: where MLflow's runs are, and the passwords that it must not contain."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from pipeline.system.errors import InputError
from pipeline.system.host import project_root
from pipeline.tracking import mlflow_store
from pipeline.tracking.mlflow_store import EXPERIMENT, connect, open_store, store_uri
from pipeline.tracking.recorder import Recorder


@pytest.mark.parametrize(
    "uri", ["https://me:s3cret@mlflow.example", "postgresql://me:s3cret@host/db", "postgresql://h/db?password=s3cret"]
)
def test_a_password_in_the_uri_is_refused_before_training_begins_and_is_not_shown(uri, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(
        InputError, match=r"MLFLOW_TRACKING_URI contains a password.*MLFLOW_TRACKING_PASSWORD"
    ) as refused:
        Recorder(tmp_path)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "file:///x", "localhost:5000", "10.0.0.1:5000", "http:/h", "http://", "http://[::1",
            "http://h:99999", "sqlite:/x.db", "sqlite://x.db", "HTTP://h"]
)  # fmt: skip
def test_what_is_neither_a_server_nor_a_database_is_refused_before_training_begins(uri, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=r"write http://HOST:PORT or sqlite:///FILE .*migrate-filestore"):
        Recorder(tmp_path)


def test_a_timeout_that_is_not_a_number_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10 s")
    with pytest.raises(InputError, match="MLFLOW_HTTP_REQUEST_TIMEOUT is '10 s': set it to a whole number"):
        connect("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (None, "sqlite:////project/mlflow.db"),
        ("sqlite:///shared/runs.db", "sqlite:////project/shared/runs.db"),
        ("sqlite:////elsewhere/runs.db", "sqlite:////elsewhere/runs.db"),
        *((uri, uri.strip()) for uri in ("https://me@mlflow.example", " http://h:5000\n", "databricks", "arn:aws:x")),
    ],
)
def test_a_sqlite_path_is_relative_to_the_project_and_another_uri_is_unchanged(uri, expected, monkeypatch):
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store_uri(Path("/project")) == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert store_uri(Path("/50% off")) == "sqlite:////50% off/runs.db"


@pytest.mark.parametrize(
    ("uri", "root"),
    [(None, "/a%41b"), (None, "/what?"), ("sqlite:///my%20runs.db", "/a"), ("sqlite:///a.db?x=1", "/a")],
)
def test_a_sqlite_path_that_mlflow_would_read_as_another_one_is_refused(uri, root, monkeypatch):
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=r"MLflow cannot open /.*db.*, a path with %XX or `\?`: rename it, or set"):
        store_uri(Path(root))


def test_a_copy_made_by_dvc_uses_the_store_of_its_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path
    monkeypatch.setenv("DVC_ROOT", "/repository")
    assert project_root() == Path("/repository")


@pytest.mark.parametrize("appears", [True, False])
def test_a_server_is_used_from_a_read_only_folder_and_two_clients_may_create_the_experiment_at_once(
    appears, monkeypatch, tmp_path
):
    found = [None, SimpleNamespace(name=EXPERIMENT, experiment_id="7", lifecycle_stage="active") if appears else None]

    def create(name, location):
        assert location is None  # the server chooses it
        raise MlflowException("RESOURCE_ALREADY_EXISTS")

    client = SimpleNamespace(get_experiment_by_name=lambda _: found.pop(0), create_experiment=create)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setattr(mlflow_store, "connect", lambda _: client)
    if appears:
        assert open_store(tmp_path).experiment_id == "7"
    else:
        with pytest.raises(MlflowException):
            open_store(tmp_path)
    assert not [*tmp_path.iterdir()]
