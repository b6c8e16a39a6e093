"""The doctor on real folders and stores: it finds every fault and changes nothing."""

from functools import partial
from uuid import uuid4

import pytest
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.config.sections import RegistryConfig
from pipeline.ops.doctor import ErrorsLeft, examine, examine_store, examine_versions
from pipeline.registry.artifacts import fetch_version
from pipeline.registry.register import register
from pipeline.system.errors import ModelMissing
from pipeline.tracking.mlflow_store import store_uri


def test_a_bare_folder_gets_a_line_for_each_check_and_stays_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErrorsLeft):
        examine(tmp_path, fix=True)
    topics = [line[8:].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert topics == ["packages", "git", "dvc", "git", "params", "store"]
    assert not [*tmp_path.iterdir()]


def test_a_server_that_is_down_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # no server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ModelMissing, match=r"^MLflow's store http://127.0.0.1:9 fails \(.*then repeat$"):
        list(examine_store(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_altered_and_missing_versions_of_all_models_are_named(store, tmp_path, cheap_versions, monkeypatch):
    search = partial(store.client.search_registered_models, max_results=1)  # many pages
    monkeypatch.setattr(store.client, "search_registered_models", search)
    altered, lost, foreign = (f"model-{uuid4().hex[:8]}" for _ in range(3))
    for i, name in enumerate((altered, altered, lost)):
        project = trained_project(tmp_path / str(i), salt=i)
        register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1), lambda *_: 0.0)
    store.client.create_registered_model(foreign)  # not by `register`
    store.client.create_model_version(foreign, "/nowhere")

    found = list(examine_store(root_of(store)))
    assert (found[0].mark, found[0].what) == ("ok", f"{store_uri(root_of(store))} answers")
    assert {"runs", "journals", "versions"} <= {finding.topic for finding in found}
    intact = found[-1].what
    assert all(version in intact for version in (f"{altered} 1", f"{altered} 2", f"{lost} 1"))

    def weights(name):
        return fetch_version(store, store.client.get_model_version(name, "1")) / "model" / "model.safetensors"

    weights(altered).write_bytes(b"weightS\0")
    weights(lost).unlink()
    *faults, last = examine_versions(store)
    for name, words in ((altered, "is altered"), (lost, "is missing")):
        (finding,) = [finding for finding in faults if f"{name} version" in finding.what]
        assert finding.mark == "to fix"
        assert words in finding.what
        assert "dvc repro -f -s register" in finding.what
    assert f"{altered} 2" in last.what
    assert f"{altered} 1" not in last.what
    assert not [finding for finding in (*faults, last) if foreign in finding.what]
