"""A project under DVC: repros beside a sweep and other commands, killed, repeated in a clone, with an altered cache."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import nbformat
import psutil
import pytest
import yaml
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)
from nbclient import NotebookClient

from pipeline.config.recipes import apply_recipe, write_values
from pipeline.config.sections import RegistryConfig
from pipeline.registry.catalog import open_registry, verify_versions
from pipeline.registry.register import register
from pipeline.system.files import read_json, sha256_file
from pipeline.tracking.journal import STEPS, TIMES
from tests.waiting import is_alive, wait_until

BIN = Path(sys.executable).parent
PATIENCE_S = 300  # for any command, on a machine that others use too
DIFFER = {TIMES, "timing.json", "speed.png", "registered.json"}  # files that hold times or ids of runs


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C", "PYTHONUNBUFFERED": "1"}


def start(project, *command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment(), **pipes)


def output_of(process, code=0):
    """What a command has printed; it must end with this exit code and without a traceback."""
    said = process.communicate(timeout=PATIENCE_S)[0]
    assert "Traceback" not in said, said
    assert process.returncode == code, said
    return said


def trainer_of(repro):
    """The process of the stage `train` of a repro that has taken some steps; None before."""
    for process in psutil.Process(repro.pid).children(recursive=True):
        if "stages.train" in process.cmdline() and steps_in(Path(process.cwd())) > 3:
            return process
    return None


def steps_in(project):
    """Steps of all runs of the project, without those of studies."""
    return sum(path.read_text().count("\n") for path in project.glob(f"checkpoints/*/{TIMES}"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory, copy_project, commit_all):
    """A repository of its own, under a difficult name."""
    folder = tmp_path_factory.mktemp("dvc") / "a project with späces"
    copy_project(folder)
    (folder / "dvc.lock").unlink(missing_ok=True)
    write_values({"train.threads": 1, "sweep.trials": 2, "sweep.pruner": "none"}, folder / "params.yaml")
    commit_all(folder)
    return folder


@pytest.fixture(scope="module")
def project(repository):
    """The repository after a sweep and, at the same time, a repro that was killed and repeated."""
    apply_recipe("smoke", repository / "params.yaml", repository / "recipes")
    trials = repository / "checkpoints" / "smoke"
    sweep = start(repository, sys.executable, "-m", "pipeline", "sweep")
    assert wait_until(lambda: list(trials.glob(f"*/{TIMES}")) or sweep.poll() is not None, PATIENCE_S)
    repro = start(repository, "dvc", "repro")
    trainer = wait_until(lambda: repro.poll() is not None or trainer_of(repro), PATIENCE_S)
    assert repro.poll() is None, output_of(repro)
    trainer.send_signal(signal.SIGSTOP)  # so that it still runs while the others start
    commands = [["dvc", "repro"], [sys.executable, "-m", "stages.train"], [sys.executable, "-m", "pipeline", "clean"]]
    second, *others = [start(repository, *command) for command in commands]
    assert f"(PID {repro.pid})" in output_of(second, 255)  # A11: each is told which process to wait for
    for other in others:
        assert f"is held by process {trainer.pid}: wait for it or stop it" in output_of(other, 6)
    repro.kill()
    trainer.send_signal(signal.SIGCONT)
    assert wait_until(lambda: not is_alive(trainer), 60)  # A10: the stage ends with DVC
    repro.communicate()
    said = output_of(start(repository, "dvc", "repro"))
    assert "resumes from step" in said
    assert "champion" in said
    assert "2 of 2 trials started" in output_of(sweep).splitlines()[-1]
    assert "up to date" in output_of(start(repository, "dvc", "repro"))
    return repository


def test_a_sweep_and_a_killed_repro_side_by_side_leave_everything_complete(project, capsys):  # A10, A11
    verify_versions(open_registry(project), "shakespeare-gpt2")
    assert capsys.readouterr().out.count(": ok, model") == 1
    assert query(project / "mlflow.db", "pragma integrity_check") == [("ok",)]
    assert query(project / "mlflow.db", "select distinct status from runs") == [("FINISHED",)]
    per_run = "select count(*), count(distinct step), max(step) from metrics where key = 'loss' group by run_uuid"
    steps = query(project / "mlflow.db", per_run)
    assert len(steps) == 1 + 2  # the model and two trials
    assert all(len(set(counts)) == 1 for counts in steps)  # each step once
    # The first trial has the settings of params.yaml: the same run, which nobody interrupted.
    fingerprint = read_json(project / "models" / "run.json")["fingerprint"]
    home = project / "checkpoints"
    assert (home / "smoke" / fingerprint / STEPS).read_bytes() == (home / fingerprint / STEPS).read_bytes()


def query(database, sql):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def test_the_notebook_in_a_clone_elsewhere_makes_the_same_bytes(project, tmp_path, monkeypatch):  # B8
    clone = tmp_path / "another place" / "ünd a much longer name, of a clone in another zone and another language"
    subprocess.run(["git", "clone", "-q", project, clone], check=True, timeout=60)
    assert not (clone / "data").exists()  # nothing that the stages have made, and no cache
    assert not (clone / "dvc.lock").exists()
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    jupyter = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    other = {"TZ": "Pacific/Apia", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "7"}
    for name, value in {**other, **dict.fromkeys(jupyter, str(tmp_path))}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != str(BIN)))
    said = execute(clone / "notebooks" / "colab.ipynb", recipe="smoke")
    assert f"at work in {clone}" in said["setup"]
    assert "so: smoke" in said["recipe"]
    assert "corpus.fraction: 0.1 -> 0.005" in said["recipe"]
    assert "champion" in said["repro"]
    assert "'image/png'" in said["figure"]
    assert re.search(r"sliding_loss +0\.0\d+", said["metrics"])
    assert "FINISHED" in said["facts"]
    assert "candidate, champion" in said["facts"]
    assert "First Citizen:" in said["recite"]
    assert "ROMEO:" in said["mix"]
    assert not [cell for cell, text in said.items() if "error:" in text]
    files, outs = hashes_of(project)
    assert {"models/model/model.safetensors", "models/steps.jsonl", "reports/metrics.json"} <= files.keys()
    assert {"models/model", "data/tokens", "data/corpus.txt"} <= outs.keys()
    assert (files, outs) == hashes_of(clone)
    assert (project / "models" / TIMES).read_bytes() != (clone / "models" / TIMES).read_bytes()


def execute(path, **parameters):
    """Run a notebook with these values for its parameters; return each cell's outputs, as one text, by its id."""
    notebook = nbformat.read(path, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=2 * PATIENCE_S, kernel_name="python3", resources=resources).execute()
    return {cell.id: str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}


def hashes_of(project):
    """Hashes of all files that the stages have written, and of the outs in dvc.lock, except those that hold times."""
    found = [path for part in ("data", "models", "reports") for path in (project / part).rglob("*") if path.is_file()]
    files = {str(path.relative_to(project)): sha256_file(path) for path in found}
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    return tuple({path: sha for path, sha in each.items() if Path(path).name not in DIFFER} for each in (files, outs))


def test_an_altered_cache_entry_is_refused_by_the_stage_that_reads_it(project):  # B6
    tokens = project / "data" / "tokens" / "train-00000.bin"
    original = tokens.read_bytes()
    cached = [path for path in (project / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]
    entry = next(path for path in cached if path.read_bytes() == original)
    entry.chmod(0o644)
    entry.write_bytes(original[:100] + bytes([original[100] ^ 1]) + original[101:])
    entry.chmod(0o444)
    shutil.rmtree(project / "data" / "tokens")
    start(project, "dvc", "checkout", "data/tokens").communicate()
    said = output_of(start(project, "dvc", "repro", "train", "--force", "--single-item"), 255)
    assert "train-00000.bin" in said
    assert "chmod -R u+w .dvc/cache" in said
    # What the message says to do helps.
    subprocess.run(["chmod", "-R", "u+w", ".dvc/cache"], cwd=project, check=True)
    output_of(start(project, "dvc", "repro", "--force", "tokenize"))
    output_of(start(project, "dvc", "repro"))
    assert tokens.read_bytes() == original


def test_two_registrations_at_once_make_one_version(store, tmp_path, cheap_versions):  # C5
    project, config = trained_project(tmp_path), RegistryConfig(model=f"m-{uuid4().hex[:8]}", max_target_loss=0.1)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: register(root_of(store), project, config), range(2)))
    assert [each["version"] for each in done] == ["1", "1"]
    assert len(store.client.search_model_versions(f"name = '{config.model}'")) == 1
    assert sum("there was no champion" in each["reason"] for each in done) == 1
