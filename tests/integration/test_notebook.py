"""The notebook, run as a student runs it: from top to bottom, with the recipe that takes seconds."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from pipeline import __main__ as command_line

ROOT = Path(__file__).parents[2]
NOTEBOOK = Path("notebooks") / "colab.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(ROOT / NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, copy_project: Any, commit_all: Any) -> Path:
    """A repository of its own with what is here, committed or not."""
    folder = tmp_path_factory.mktemp("notebook") / "project"
    copy_project(folder)
    commit_all(folder)
    return folder


@pytest.fixture
def kernel_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel inherits: no foreign store, no folders of the user's own, and not the PATH of this environment."""
    for name in [name for name in os.environ if name.startswith(("DVC", "MLFLOW"))]:
        monkeypatch.delenv(name)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    here = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != here))


def execute(notebook: Any, folder: Path, **parameters: str) -> dict[str, Any]:
    """Run the cells with these values in `folder`; return each cell's outputs, as one text, by its id."""
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return {cell.id: str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_command_that_the_notebook_shows_is_one(notebook, monkeypatch):
    text = "\n".join(cell.source for cell in notebook.cells)
    shown = re.findall(r"python -m pipeline (.+?)(?:`|['\"]\))", text)  # in the table, or in run("...")
    assert {line.split()[0] for line in shown} == {"export", "generate", "models", "recipe", "run", "sweep"}
    for line in shown:
        monkeypatch.setattr(sys, "argv", ["pipeline", *shlex.split(line)])
        assert isinstance(command_line.parse(), argparse.Namespace)  # or exits with 2


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(notebook, project, kernel_home):
    said = execute(notebook, project / "notebooks", recipe="smoke")
    assert f"at work in {project}" in said["setup"]
    assert "so: smoke" in said["recipe"]
    assert "corpus.fraction: 0.1 -> 0.005" in said["recipe"]
    assert "champion" in said["repro"]
    assert "'image/png'" in said["figure"]
    assert re.search(r"corpus_loss +0\.0\d+", said["metrics"])
    assert "FINISHED" in said["facts"]
    assert "candidate, champion" in said["facts"]
    assert "First Citizen:" in said["recite"]
    assert "ROMEO:" in said["mix"]
    assert not [cell for cell, text in said.items() if "error:" in text]


@pytest.mark.slow
def test_outside_of_the_project_it_clones_and_installs_it(notebook, project, kernel_home, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # all but the installation itself, which would replace what is here
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # so it is off: with torch's setuptools; pip reads 0 as 1 here
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("parameters", "setup")]
    (tmp_path / "elsewhere").mkdir()
    said = execute(notebook, tmp_path / "elsewhere", repository=str(project))
    clone = tmp_path / "elsewhere" / "gpt2-to-target"
    assert f"at work in {clone}" in said["setup"]
    assert (clone / "dvc.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["git clone", "pip install"])
def test_what_fails_stops_the_notebook(notebook, project, kernel_home, tmp_path, monkeypatch, fails):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # should it not fail
    repository = project if fails == "pip install" else tmp_path / "nowhere"
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("parameters", "setup")]
    with pytest.raises(CellExecutionError, match=f"{fails}.*: the last lines above say what went wrong"):
        execute(notebook, tmp_path, repository=str(repository))
