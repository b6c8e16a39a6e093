"""Stages and commands as processes: what they refuse, say and import before anything is opened."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def command(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


@pytest.mark.fault
@pytest.mark.parametrize("stage", ["download", "download_tokenizer", "tokenize", "train", "evaluate", "register"])
def test_a_stage_refuses_bad_parameters_before_it_opens_anything(folder, stage):  # B9
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section in params.values():
        section["nonsense"] = 1
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    before = sorted(folder.rglob("*"))
    code, _, said = command(f"stages.{stage}", cwd=folder)
    assert code == 2
    assert said.startswith("error: params.yaml: ")
    assert said.count("\n") == 1
    assert "nonsense: unknown key" in said
    assert sorted(folder.rglob("*")) == before


def test_a_stage_started_in_the_wrong_folder_says_where_to_run():
    code, _, said = command("stages.evaluate", cwd=ROOT / "stages")
    assert (code, said.count("\n")) == (2, 1)
    assert "from the project's folder" in said


@pytest.mark.parametrize("program", [["-m", "pipeline", "doctor"], ["-m", "stages.train"], ["app.py"]])
def test_a_python_without_the_packages_is_told_in_a_line(program):
    no_packages = "-S"
    done = subprocess.run([sys.executable, no_packages, *program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {sys.executable} has no \w+: activate .venv, .*\n", done.stderr)


IMPORTED = """if True:
    import sys
    from pipeline.__main__ import main
    try:
        main(sys.argv[1:])
    except SystemExit:
        pass
    print("imported:", *(name for name in ("torch", "mlflow", "pandas", "optuna") if name in sys.modules))
    """


@pytest.mark.parametrize(
    ("arguments", "needless"),
    [
        (["--help"], "torch mlflow pandas optuna"),
        (["recipe"], "torch mlflow pandas optuna"),
        (["check"], "torch mlflow pandas optuna"),
        (["sweep", "--help"], "torch mlflow pandas optuna"),
        (["generate", "--help"], "torch mlflow pandas optuna"),
        (["run"], "torch optuna"),
        (["models", "list"], "torch optuna"),
    ],
)
def test_a_command_does_not_import_what_it_does_not_need(folder, arguments, needless):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", IMPORTED, *arguments]
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert not {*done.stdout.splitlines()[-1].split()} & {*needless.split()}
