"""The command line, in process: exit codes, one line for what the user can cause, and what `clean` removes."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.system.files import locked
from pipeline.tracking.fingerprint import IDENTITY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project's folder, in which commands run."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder, capsys):
    """Runs a command; returns its exit code, and what it printed and said on stderr."""

    def call(*arguments):
        code = main(arguments)
        return code, *capsys.readouterr()

    return call


def test_the_committed_params_are_sound(command):
    assert command("check") == (0, "params.yaml is sound\n", "")


@pytest.fixture
def runs(folder):
    """Two runs of one fingerprint, another's, and a study, in checkpoints/."""
    for name in ("aaaa", "aaaa.1", "bbbb", "search/cccc"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / IDENTITY).write_text("x")
    return folder / "checkpoints"


def kept(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir())


def test_clean_removes_the_checkpoints_of_a_run_and_nothing_else(command, runs, folder):
    (folder / "models").mkdir()
    code, said, _ = command("clean", "aaaa")
    assert (code, said) == (0, "removed aaaa, 0 MB\nremoved aaaa.1, 0 MB\n")
    assert kept(runs) == ["bbbb", "search"]
    assert (folder / "models").is_dir()


@pytest.mark.parametrize("name", ["bb", "..", ".", "bbbb/../../models", "/"])
def test_clean_refuses_what_is_no_run_and_no_study(command, runs, folder, name):
    (folder / "models").mkdir()
    code, _, said = command("clean", name)
    assert (code, said.count("\n")) == (2, 1)
    assert kept(runs) == ["aaaa", "aaaa.1", "bbbb", "search"]
    assert (folder / "models").is_dir()


def test_clean_of_all_leaves_studies(command, runs, folder):
    code, said, _ = command("clean")
    assert code == 0
    assert "kept search: a study goes only by its name" in said
    assert kept(runs) == ["search"]
    assert command("clean", "search")[0] == 0
    assert not list(runs.iterdir())


def test_clean_leaves_a_run_that_trains(command, runs, folder):
    with locked(runs / "aaaa.lock"):
        code, _, said = command("clean")
    assert code == 6
    assert "aaaa" in said
    assert kept(runs) == ["aaaa", "aaaa.1", "bbbb", "search"]


@pytest.mark.parametrize("arguments", [["recipe", "lapto"], ["run"]])
def test_what_is_not_there_is_named_in_a_line(command, arguments):
    code, _, said = command(*arguments)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("package", ["pipeline", "stages", "webapp"])
def test_nothing_happens_at_import(package):
    """No module calls something for its effect, or decides something, when it is imported."""
    for path in {*(ROOT / package).rglob("*.py")} - {ROOT / "pipeline/registry/pyfunc.py"}:  # which MLflow runs
        for statement in ast.parse(path.read_text()).body:
            acts = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            assert not acts, f"{path}: {ast.unparse(statement)}"
            asks = isinstance(statement, ast.If) and ast.unparse(statement.test)
            assert asks in (False, "__name__ == '__main__'", "TYPE_CHECKING"), f"{path}: if {asks}"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "COMMAND"),
        (["models", "promote"], 2, "name a version"),
        (["models", "frobnicate"], 2, "invalid choice"),
        (["sweep", "--trials", "[1"], 2, "is not YAML"),
        (["recipe", "smoke", "--as-set"], 0, "-S optim.max_tokens="),
    ],
)
def test_the_command_line_answers_with_its_exit_code(monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(ROOT)
    try:
        found = main(arguments)
    except SystemExit as stopped:  # argparse's own
        found = stopped.code
    assert found == code
    assert words in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("started", "prog"), [("/x/bin/totarget", "totarget"), ("/x/__main__.py", "python -m pipeline")]
)
def test_help_names_the_program_as_it_was_started(monkeypatch, capsys, started, prog):
    monkeypatch.setattr(sys, "argv", [started, "clean", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith(f"usage: {prog} clean ")
