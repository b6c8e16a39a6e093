"""A version that an earlier program has registered is read, verified, served and exported.

tests/versions/format-1.zip is a version of format 1; tests/versions/make.py says how it was made.
"""

import json
import zipfile

import pytest
from fixtures_network import ROOT
from fixtures_registry import _command, _keep_threads, _name  # noqa: F401 (fixtures)
from mlflow.entities import Metric, Param

from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.registry.artifacts import FORMAT, open_version
from pipeline.registry.catalog import describe_version, find_version, verify
from pipeline.system.errors import IntegrityError


@pytest.fixture
def version(store, name, tmp_path):
    """The version of format 1 in a store, with its run."""
    with zipfile.ZipFile(ROOT / "tests" / "versions" / "format-1.zip") as archive:
        archive.extractall(tmp_path / "old")
    saved = json.loads((tmp_path / "old" / "version.json").read_text())
    run_id = store.client.create_run(store.experiment_id, tags=saved["run_tags"]).info.run_id
    metrics = [Metric(key, value, ms, step) for key, points in saved["metrics"].items() for step, value, ms in points]
    store.client.log_batch(run_id, metrics, [Param(key, value) for key, value in saved["params"].items()])
    store.client.create_registered_model(name)
    store.client.create_model_version(name, str(tmp_path / "old" / "files"), run_id, tags=saved["tags"])
    store.client.set_registered_model_alias(name, "champion", "1")
    return find_version(store, name, "champion")


def test_a_version_of_format_1_is_verified_described_and_served(store, version):
    assert FORMAT == "1", "keep this version readable, and add one of the new format beside it"
    assert verify(store, version).endswith(f"ok, model {version.tags['model_sha256']}")
    files = open_version(store, version)
    info = describe_version(store, version, files)
    assert (info["rule"]["name"], info["params"]["corpus"]["source"]) == ("sliding", "texts/days.txt")
    assert (info["metrics"]["sliding_loss"], info["history"]["loss"][-1][0]) == (pytest.approx(1.46594, abs=1e-5), 48)
    generator = load_generator(files, "fp32")
    # What the program that trained it generated: the model has learnt only the most frequent words.
    assert (
        generator.text("Day 7: the ", Sampling(temperature=0.0, max_tokens=24)) == "Day 7: the the the  on the the the "
    )


def test_a_version_of_format_1_is_used_by_the_commands(version, command, tmp_path, capsys):
    assert [command("models"), command("models", "verify"), command("generate", "Day 7")] == [0, 0, 0]
    assert "champion" in capsys.readouterr().out
    for kind, file in (("hf", "model.safetensors"), ("gguf", f"{version.name}-v1-f16.gguf"), ("space", "app.py")):
        assert command("export", kind, str(tmp_path / kind)) == 0
        assert (tmp_path / kind / file).is_file()


def test_a_version_of_a_later_format_is_refused_in_one_line(store, version, command, capsys):
    store.client.set_model_version_tag(version.name, "1", "format", "2")
    with pytest.raises(IntegrityError, match="has the format 2, but this program reads format 1: "):
        open_version(store, find_version(store, version.name, "1"))
    assert command("generate", "Day 7") == 3
    assert capsys.readouterr().err.count("\n") == 1
