"""How app.py starts: its arguments, and its errors without a model."""

import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures_app import _version  # noqa: F401 (fixture)
from fixtures_registry import alter

import app
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from webapp import registry_source, server
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
        (["--port", "0"], "run `make repro`"),
        (["--port", "0", "--folder", "nowhere"], "nowhere not found"),
        (["--port", "0", "--folder", "empty"], "export space"),
        (
            ["--port", "0", "--model", "it's"],
            "--model: registry.model: should be a name of letters, digits and ._-, got",
        ),
        (["--share"], "unrecognized arguments: --share"),
        (["--port", "many"], "invalid int value: 'many'"),
        (["--port", "TAKEN"], "(another program uses this port):"),  # before a model is loaded
        (["--folder", "VERSION", "--port", "99999"], "127.0.0.1:99999 (a port is a number from 0 to 65535):"),
        (["--folder", "VERSION", "--port", "TAKEN"], "(another program uses this port):"),
        (["--folder", "VERSION", "--host", "192.0.2.1", "--api-key", "k"], "(cannot assign requested address):"),
    ],
)
def test_without_a_model_or_with_wrong_arguments_it_says_what_to_do(version, project, monkeypatch, arguments, error):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"VERSION": str(version), "TAKEN": str(taken.getsockname()[1])}
        monkeypatch.setattr(sys, "argv", ["app.py", *(values.get(each, each) for each in arguments)])
        with pytest.raises((ModelMissing, InputError)) as end:
            app.main()
    assert error in str(end.value)


def test_port_0_is_a_free_port_which_it_says_and_serves(project, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(
        app, "open_source", lambda arguments: SimpleNamespace(current=lambda: SimpleNamespace(label="parrot version 7"))
    )
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "serve", lambda app, host, port: served.append(f"http://{host}:{port} "))
    monkeypatch.setattr(sys, "argv", ["app.py", "--port", "0"])
    app.main()
    assert served[0] in capsys.readouterr().out
    assert served != ["http://127.0.0.1:0 "]


def test_the_default_model_is_that_of_params_yaml(project, monkeypatch):
    monkeypatch.setattr(registry_source, "Registry", lambda root, name, which, precision: (root, name, which))
    for arguments, name in (([], "other-gpt2"), (["--model", "mine"], "mine")):
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        assert app.open_source(app.build_parser().parse_args()) == (project, name, "champion")


def test_an_altered_folder_is_not_served(version, tmp_path):
    folder = Path(shutil.copytree(version, tmp_path / "version"))
    alter(folder / "model" / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Folder(folder)
