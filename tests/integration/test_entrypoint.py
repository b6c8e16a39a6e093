"""Stages and commands as processes: what they refuse, print and import before anything is opened."""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from pipeline.system.entrypoint import exit_code_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project's folder, in which commands run."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", ["download", "tokenizer", "tokenize", "train", "evaluate", "register"])
def test_a_stage_refuses_invalid_parameters_before_it_opens_anything(folder, stage, monkeypatch, capsys):  # B9
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section in params.values():
        section["nonsense"] = 1
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", [stage])
    assert exit_code_of(import_module(f"stages.{stage}").main) == 2
    assert re.fullmatch(r"error: params.yaml: .*nonsense: unknown key.*\n", capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before


def run(*arguments, folder=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_stage_started_in_the_wrong_folder_says_where_to_run():
    done = run("-m", "stages.evaluate", folder=ROOT / "stages")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "from its parent, the project's folder" in done.stderr


@pytest.mark.parametrize("program", [["-m", "pipeline", "doctor"], ["-m", "stages.train"], ["app.py"]])
def test_a_python_without_the_packages_says_so_in_one_line(program):
    done = run("-S", *program)  # without site-packages
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {sys.executable} has no \w+: activate .venv, .*\n", done.stderr)


@pytest.mark.parametrize("program", [["-m", "pipeline", "models"], ["-m", "stages.train"], ["app.py"]])
def test_ctrl_c_during_the_first_imports_leaves_no_traceback(program, tmp_path, monkeypatch, interruptible):  # A8
    (tmp_path / "argparse.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # its argparse, which each program imports first, is found first
    done = subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


# A program that prints a character, and then ends as its second argument says.
PRINTING = """if True:
    import sys
    from pipeline.system.entrypoint import exit_code_of, run_stage
    from pipeline.system.errors import ModelMissing
    def main():
        print("\u7ea2")
        if sys.argv[2] != "ok":
            raise SystemExit if sys.argv[2] == "help" else ModelMissing("none")
    run_stage(main) if sys.argv[1] == "stage" else sys.exit(exit_code_of(main))
    """


@pytest.mark.parametrize(
    ("redirection", "end", "code", "message"),
    [
        (">&-", "ok", 0, ""),
        (">&- 2>&- <&-", "error", 7, ""),
        (">&-", "error", 7, "error: none\n"),
        (">&$2", "ok", 141, ""),
        (">&$2", "error", 7, "error: none\n"),
        (">&$2", "help", 0, ""),
        pytest.param(
            *(">/dev/full", "ok", 5, "error: disk full: make room and run the same command again\n"),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/full"),
        ),
    ],
)
def test_output_that_nobody_can_read_gives_no_traceback(redirection, end, code, message, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # else it fails when it is printed, and not at the end
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    reader, writer = os.pipe()
    os.close(reader)
    shell = ["bash", "-c", f'"$0" -c "$1" command {end} {redirection}', sys.executable, PRINTING, str(writer)]
    done = subprocess.run(shell, capture_output=True, text=True, pass_fds=[writer])
    os.close(writer)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message)


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for kind in ("stage", "command"):
        assert run("-c", PRINTING, kind, "ok").stdout == "\\u7ea2\n"


WINDOWS = """if True:
    import runpy, signal, sys
    sys.platform = "win32"
    sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"]))  # they cannot be imported
    del signal.SIGALRM, signal.SIGHUP, signal.SIGKILL
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
    """


@pytest.mark.parametrize("program", ["pipeline/__main__.py", "stages/train.py", "app.py", "setup.py"])
def test_windows_is_refused_in_one_line_before_anything_is_installed(program):
    line = "this program runs on Linux and macOS: on Windows, run it in WSL 2"
    done = run("-S", "-c", WINDOWS, program)
    assert (done.returncode > 0, done.stdout, done.stderr) == (True, "", f"error: {line}\n")
    make = subprocess.run(["make", "--dry-run", "OS=Windows_NT"], cwd=ROOT, capture_output=True, text=True)
    assert (make.returncode, make.stdout, line in make.stderr) == (2, "", True)


IMPORTS = """if True:
    import sys
    from pipeline.__main__ import main
    for command in ["--help"], ["recipe"], ["check"], ["sweep", "--help"], ["generate", "--help"], ["run"], ["models"]:
        try:
            main(command)
        except SystemExit:
            pass
        print("imported:", *sorted({"torch", "mlflow", "pandas", "optuna"} & sys.modules.keys()))
    """


def test_a_command_imports_only_what_it_needs(folder):
    *without_stores, run_, models = re.findall("^imported:(.*)", run("-c", IMPORTS, folder=folder).stdout, re.MULTILINE)
    assert without_stores == [""] * 5
    assert not re.search("torch|optuna", run_ + models)
