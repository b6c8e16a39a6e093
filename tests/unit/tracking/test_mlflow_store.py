"""The store's URI: where MLflow's runs are, and the passwords that it must not contain."""

from pathlib import Path

import pytest

from pipeline.system.errors import InputError
from pipeline.system.host import project_root
from pipeline.tracking.mlflow_store import connect, store_uri
from pipeline.tracking.recorder import Recorder


@pytest.mark.parametrize(
    "uri", ["https://me:s3cret@mlflow.example", "postgresql://me:s3cret@host/db", "postgresql://h/db?password=s3cret"]
)
def test_a_password_in_the_uri_is_refused_before_training_begins_and_is_not_shown(uri, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(
        InputError, match=r"MLFLOW_TRACKING_URI contains a password.*MLFLOW_TRACKING_PASSWORD"
    ) as refused:
        Recorder(tmp_path, tmp_path, {}, {})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "file:///x", "localhost:5000", "10.0.0.1:5000", "http:/h", "http://", "http://[::1",
            "http://h:99999", "sqlite:/x.db", "sqlite://x.db", "HTTP://h"]
)  # fmt: skip
def test_what_is_neither_a_server_nor_a_database_is_refused_before_training_begins(uri, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=r"write http://HOST:PORT or sqlite:///FILE .*migrate-filestore"):
        Recorder(tmp_path, tmp_path, {}, {})


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


def test_a_copy_made_by_dvc_uses_the_store_of_its_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path
    monkeypatch.setenv("DVC_ROOT", "/repository")
    assert project_root() == Path("/repository")
