"""The store's address: where MLflow's runs are, and what is refused in it."""

from pathlib import Path

import pytest

from pipeline.system.errors import InputError
from pipeline.tracking.mlflow_store import store_uri
from pipeline.tracking.recorder import Recorder

pytestmark = pytest.mark.security


@pytest.mark.parametrize(
    "given", ["https://me:s3cret@mlflow.example", "postgresql://me:s3cret@host/db", "postgresql://h/db?password=s3cret"]
)
def test_a_password_in_the_address_is_refused_before_training_begins_and_is_not_shown(given, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI holds a password.*MLFLOW_TRACKING_PASSWORD") as refused:
        Recorder(tmp_path, tmp_path, {}, {})
    assert "s3cret" not in str(refused.value)


def test_an_address_without_a_password_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me@mlflow.example")
    assert store_uri(Path("/project")) == "https://me@mlflow.example"
