"""Repros, sweeps, registrations and an app on one checkout at once: each ends well, or says who holds what."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from gradio_client import Client

from pipeline.config.recipes import apply_recipe, write_values
from pipeline.tracking.journal import STEPS, TIMES
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.fault]
BIN = Path(sys.executable).parent
PATIENCE_S = 600  # for anything at all, on a machine that others use too
PYTHON = (sys.executable, "-m")
DVC_IS_BUSY = (
    "Unable to acquire lock. Most likely another DVC process is running"  # told after three seconds of waiting
)


@pytest.fixture(scope="module")
def project(tmp_path_factory, copy_project, commit_all):
    """A repository with the smoke recipe, a sweep of two trials, and a trained model that is not registered yet."""
    folder = tmp_path_factory.mktemp("together") / "w"
    copy_project(folder)
    (folder / "dvc.lock").unlink(missing_ok=True)
    apply_recipe("smoke", folder / "params.yaml", folder / "recipes")
    write_values({"train.threads": 1, "sweep.trials": 2, "sweep.pruner": "none"}, folder / "params.yaml")
    commit_all(folder)
    ends(start(folder, "dvc", "repro", "plot"))
    return folder


def start(project, *command):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    environment = {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ends(process, *codes):
    """What a command said, which ended with one of `codes`, or well."""
    said = process.communicate(timeout=PATIENCE_S)[0]
    assert "Traceback" not in said, said
    assert process.returncode in (codes or (0,)), said
    return said


@pytest.fixture(scope="module")
def registrations(project):
    """What two registrations say that were begun together."""
    return [ends(process) for process in [start(project, *PYTHON, "stages.register") for _ in range(2)]]


@pytest.fixture(scope="module")
def app(project, registrations):
    """The address of an app that serves the champion."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(project, sys.executable, "app.py", "--port", str(port))
    assert process.stdout is not None
    assert "shakespeare-gpt2 version 1" in (said := process.stdout.readline()), said + process.stdout.read()
    with socket.socket() as socket_:
        assert wait_until(lambda: socket_.connect_ex(("127.0.0.1", port)) == 0, PATIENCE_S)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    assert "Traceback" not in process.communicate(timeout=PATIENCE_S)[0]


def rows(folder):
    return sum(path.read_text().count("\n") for path in folder.glob(f"*/{TIMES}"))


def trainer(project):
    """The process of the stage `train` in the project; None where there is none."""
    for process in psutil.process_iter():
        try:
            if "stages.train" in process.cmdline() and process.cwd() == str(project):
                return process
        except psutil.Error:
            continue
    return None


def training(project):
    """A `dvc repro`, and its stage `train` once it has taken some steps."""
    before = rows(project / "checkpoints")
    repro = start(project, "dvc", "repro")
    assert wait_until(lambda: rows(project / "checkpoints") > before + 5 or repro.poll() is not None, PATIENCE_S)
    process = trainer(project)
    assert process, ends(repro)
    return repro, process


def ask(app):
    """The label of the model that answers."""
    answer = Client(app, verbose=False).predict("First Citizen:", 8, 0, api_name="/generate")
    assert answer["finished"]
    assert answer["samples"][0]["text"]
    return answer["model"]


def versions(project):
    return [
        number for (number,) in rows_of(project / "mlflow.db", "select version from model_versions order by version")
    ]


def test_two_registrations_at_once_make_one_version(project, registrations):  # C5
    assert all("shakespeare-gpt2 version 1, run" in said for said in registrations)
    assert sum("there was no champion" in said for said in registrations) == 1
    assert sum("is the champion" in said for said in registrations) == 1
    assert versions(project) == [1]


def test_who_comes_while_a_repro_trains_is_told_who_holds_what(project, app):  # A11
    write_values({"optim.lr": 0.0041}, project / "params.yaml")
    repro, process = training(project)
    process.send_signal(signal.SIGSTOP)  # so that it is still there when the others come, however slow they are
    try:
        assert f"(PID {repro.pid})" in ends(start(project, "dvc", "repro"), 255)
        said = ends(start(project, *PYTHON, "pipeline", "sweep"), 2)
        assert f"(PID {repro.pid})" in said
        assert said.splitlines()[-1] == "error: sweep: `dvc repro tokenize` failed, as shown above: fix that first"
        for command in (("stages.train",), ("pipeline", "clean")):
            said = ends(start(project, *PYTHON, *command), 6)
            assert f"is held by process {process.pid}: wait for it or stop it" in said.splitlines()[-1]
        assert ask(app) == "shakespeare-gpt2 version 1"
    finally:
        process.send_signal(signal.SIGCONT)
    assert "Running stage 'register'" in ends(repro)
    assert versions(project) == [1, 2]


def test_repros_sweeps_app_and_commands_work_side_by_side(project, app):
    write_values({"optim.lr": 0.0042}, project / "params.yaml")
    home = project / "checkpoints"
    sweeps = [start(project, *PYTHON, "pipeline", "sweep") for _ in range(2)]
    assert wait_until(lambda: rows(home / "smoke") or all(s.poll() is not None for s in sweeps), PATIENCE_S)
    repro, _ = training(project)  # the same run as the first trial, in a folder of its own
    second = start(project, "dvc", "repro")
    answers = [ask(app)]
    for command in (
        ["models"],
        ["recipe"],
        ["check"],
        ["generate", "ROMEO:", "--max-tokens", "5"],
        ["sweep", "status"],
    ):
        ends(start(project, *PYTHON, "pipeline", *command))
        answers.append(ask(app))
    # One of the sweeps did it all; the other one is told of it, or of the repro, where it came to DVC only then.
    said = {sweep.pid: ends(sweep, 0, 2, 6) for sweep in sweeps}
    (worked,) = (sweep.pid for sweep in sweeps if sweep.returncode == 0)
    assert "2 of 2 trials begun" in said.pop(worked).splitlines()[-1]
    ((_, told),) = said.items()
    assert f"is held by process {worked}" in told or f"(PID {repro.pid})" in told, told
    # One of the repros did it all; the other one is told of it, or found nothing left to do.
    told = ends(second, 0, 255)
    assert f"(PID {repro.pid})" in told or "up to date" in told or DVC_IS_BUSY in told, told
    done = ends(repro, 0, 255)
    if repro.returncode:
        assert DVC_IS_BUSY in done, done
        done = ends(start(project, "dvc", "repro"))
    assert "Running stage 'register'" in done
    # The same run came out the same in both places.
    fingerprint = json.loads((project / "models" / "run.json").read_text())["fingerprint"]
    assert (home / "smoke" / fingerprint / STEPS).read_bytes() == (home / fingerprint / STEPS).read_bytes()
    assert set(answers) <= {f"shakespeare-gpt2 version {number}" for number in versions(project)}


def test_afterwards_all_is_whole_and_nothing_is_left_to_do(project, app):
    assert "Data and pipelines are up to date" in ends(start(project, "dvc", "status"))
    assert "up to date" in ends(start(project, "dvc", "repro"))
    assert ends(start(project, *PYTHON, "pipeline", "models", "verify")).count(": ok, model") == 3
    assert rows_of(project / "optuna.db", "pragma integrity_check") == [("ok",)]
    store = project / "mlflow.db"
    assert rows_of(store, "pragma integrity_check") == [("ok",)]
    assert rows_of(store, "select distinct status from runs") == [("FINISHED",)]
    steps = rows_of(
        store, "select count(*), count(distinct step), max(step) from metrics where key = 'loss' group by run_uuid"
    )
    assert len(steps) == 3 + 2  # three models and two trials
    assert all(len(set(counts)) == 1 for counts in steps)  # each step once
    assert ask(app) in {f"shakespeare-gpt2 version {number}" for number in versions(project)}


def rows_of(database, query):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()
