"""The store's URI: where MLflow's runs are, and the passwords that it must not contain."""

from pathlib import Path

import pytest

from pipeline.system.errors import InputError
from pipeline.system.host import project_root
from pipeline.tracking.mlflow_store import store_uri
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
    ("uri", "expected"),
    [
        (None, "sqlite:////project/mlflow.db"),
        ("sqlite:///shared/runs.db", "sqlite:////project/shared/runs.db"),
        ("sqlite:////elsewhere/runs.db", "sqlite:////elsewhere/runs.db"),
        ("https://me@mlflow.example", "https://me@mlflow.example"),
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
