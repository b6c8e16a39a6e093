"""The notebook without a project around it: its setup cell clones and installs, or stops at what fails.

tests/faults/test_repro.py runs the whole notebook.
"""

import os

import nbformat
import pytest
from fixtures_network import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
SETUP = next(cell.source for cell in NOTEBOOK.cells if cell.id == "setup")


def test_the_notebook_is_valid_and_holds_no_outputs():
    nbformat.validate(NOTEBOOK)
    for cell in NOTEBOOK.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.fixture(scope="module")
def repository(tmp_path_factory, copy_project, commit_all):
    folder = tmp_path_factory.mktemp("notebook") / "repository"
    copy_project(folder)
    commit_all(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, in which nothing is installed."""
    monkeypatch.setenv("PIP_DRY_RUN", "1")
    for name in ("PATH", "PYTHONUNBUFFERED"):  # the cell changes them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_outside_of_the_project_the_setup_clones_and_installs_it(repository, elsewhere, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # means off, here: the build uses the setuptools that are here
    exec(SETUP, {"repository": str(repository)})
    assert f"at work in {elsewhere / 'gpt2-to-target'}" in capsys.readouterr().out
    assert os.path.samefile("dvc.yaml", elsewhere / "gpt2-to-target" / "dvc.yaml")


@pytest.mark.parametrize("fails", ["git clone", "python -m pip install"])
def test_the_setup_stops_at_what_fails(repository, elsewhere, fails):
    source = repository if fails.endswith("install") else elsewhere / "nowhere"
    with pytest.raises(AssertionError, match=f"{fails}.*: the last lines above say what went wrong"):
        exec(SETUP, {"repository": str(source)})  # there is no index from which pip could get setuptools
