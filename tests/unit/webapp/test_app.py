"""How app.py starts: its arguments, and its errors without a model."""

import shutil
import sys
from pathlib import Path

import pytest
from fixtures_app import _version  # noqa: F401 (fixture)

import app
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from webapp import registry_source
from webapp.model_source import Folder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with params.yaml and without a store, in which app.py is called."""
    text = (ROOT / "params.yaml").read_text().replace("model: shakespeare-gpt2", "model: other-gpt2")
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "clean_environment", lambda: None)  # it would change the environment of all tests
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "run `dvc repro`"),
        (["--folder", "nowhere"], "nowhere not found"),
        (["--folder", "empty"], "export space"),
        (["--share"], "unrecognized arguments: --share"),
        (["--port", "many"], "invalid int value: 'many'"),
    ],
)
def test_without_a_model_or_with_wrong_arguments_it_says_what_to_do(project, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises((ModelMissing, SystemExit)) as end:
        app.main()
    assert error in str(end.value) + capsys.readouterr().err


def test_the_default_model_is_that_of_params_yaml(project, monkeypatch):
    monkeypatch.setattr(registry_source, "Registry", lambda root, name, which: (root, name, which))
    for arguments, name in (([], "other-gpt2"), (["--model", "mine"], "mine")):
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        assert app.open_source(app.parse()) == (project, name, "champion")


def test_a_port_out_of_range_is_refused(version, project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--folder", str(version), "--port", "99999"])
    with pytest.raises(InputError, match=r"cannot use .*:99999"):
        app.main()


def test_an_altered_folder_is_not_served(version, tmp_path):
    folder = Path(shutil.copytree(version, tmp_path / "version"))
    weights = folder / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Folder(folder)
