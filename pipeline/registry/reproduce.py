"""Train a registered version again, and compare the weights bit for bit.

It runs the code of the recorded commit on the version's own parameters and tokens, in a temporary folder with its own
MLflow store; the folder is removed at the end.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig
from pipeline.data.token_files import data_sha256
from pipeline.data.tokenizer import n_vocab_in, tokenizer_in
from pipeline.model.published import INIT_FOLDER, copy_init, hash_of, with_hash, write_weights
from pipeline.model.published_files import find_published
from pipeline.model.weights import SHAPE, WEIGHTS
from pipeline.registry.artifacts import TEMPORARY, label_of, open_version
from pipeline.registry.catalog import identity_of
from pipeline.system.errors import InputError, IntegrityError, Interrupted
from pipeline.system.files import locked, read_json, sha256_file
from pipeline.system.host import SOURCE_ROOT, git
from pipeline.system.processes import search_path
from pipeline.system.signals import StopSignals
from pipeline.tracking.fingerprint import differences, fingerprint_of
from pipeline.tracking.mlflow_store import Store
from pipeline.tracking.recorder import RECORDER_LOCK
from pipeline.training.config import RunConfig

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def retrain(store: Store, version: "ModelVersion", repository: Path) -> str:
    """Train `version` again; return a line for the user if the weights are the same bit for bit.

    Raises IntegrityError if they differ, InputError if the code that trained the version is not in `repository`,
    Interrupted after a signal. If the training fails, the command prints its error
    and ends with its exit code.
    """
    label, files = label_of(version), open_version(store, version)
    expected = sha256_file(files / "model" / WEIGHTS)
    recorded = identity_of(store, version)
    if changes := recorded.get("inexact"):
        raise InputError(f"{label} was resumed inexactly ({'; '.join(changes)}): it cannot be repeated exactly")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder, StopSignals() as stop:
        project = _set_up(files, Path(folder) / "project", version.tags.get("init"), repository)
        with _checkout(version, files, repository, Path(folder) / "code") as code:
            _train(code, project, stop)
        found = sha256_file(project / "models" / "model" / WEIGHTS)
        again = read_json(project / "models" / "run.json")
    if found == expected:
        return f"{label} trained again: the same weights bit for bit, SHA-256 {found}"
    why = reason_for_difference(again, version.tags["fingerprint"], recorded["environment"])
    raise IntegrityError(f"{label} trained again has other weights, SHA-256 {found} instead of {expected}: {why}")


def reason_for_difference(again: dict[str, Any], fingerprint: str, environment: dict[str, str | int]) -> str:
    """Explain why a training gave other weights; `again` is its run.json, the rest was recorded with the version."""
    if again["fingerprint"] != fingerprint:
        return f"its fingerprint is {again['fingerprint']} instead of {fingerprint}"
    if changed := differences(environment, again["environment"]):
        return f"the environment differs ({', '.join(changed)})"
    return "the environment is the same, so the training is not deterministic"


def _fingerprint_here(files: Path) -> str | None:
    """The fingerprint with the present code; None if the code does not accept the parameters."""
    try:
        config = RunConfig.of(load_params(files / "params.yaml")).sized_for(n_vocab_in(files / "model"))
    except InputError:
        return None
    if init := _weights_hash(files):
        config = replace(config, model=config.model.updated(init=init))
    return fingerprint_of(data_sha256(files / "tokens"), config.decisive)


def _weights_hash(files: Path) -> str | None:
    """The hash of the published weights from which a version was trained; None if it started from random ones."""
    init = read_json(files / "model" / SHAPE)["model"].get("init")
    return None if init is None else str(init)


def _set_up(files: Path, project: Path, origin: str | None, repository: Path) -> Path:
    """Copy what the training reads. Raises InputError if the weights of `origin` are not those it started from."""
    shutil.copytree(files / "tokens", project / "data" / "tokens")
    if expected := _weights_hash(files):
        model = load_params(files / "params.yaml").section(ModelConfig)
        named, ready = str(model.init), repository / "data" / INIT_FOLDER
        if hash_of(ready) == expected:  # wherever they are now
            copy_init(ready, project / "data" / INIT_FOLDER, named)
        else:
            found = find_published(origin or named, repository)
            write_weights(found._replace(name=named), project / "data" / INIT_FOLDER)
        if with_hash(model, project / "data" / INIT_FOLDER).init != expected:
            raise InputError(
                f"{origin or named} has other weights than it had then: put those with {expected} back there, or set "
                "model.init to their folder and run `dvc repro tokenizer`"
            )
    for folder in ("tokenizer", "bpe"):  # commits from before `corpus.tokenizer` read data/bpe
        (project / "data" / folder).mkdir()
        for name in tokenizer_in(files / "model").files:
            shutil.copyfile(files / "model" / name, project / "data" / folder / name)
    shutil.copyfile(files / "params.yaml", project / "params.yaml")
    return project


@contextmanager
def _checkout(version: "ModelVersion", files: Path, repository: Path, folder: Path) -> Iterator[Path]:
    """Check out the commit that trained a version into `folder`, and yield its path.

    If the commit is missing, or the code was changed without a commit, the present code is used instead, provided that
    it gives the same fingerprint.
    """
    commit, fingerprint = version.tags.get("git_commit", "unknown"), version.tags["fingerprint"]
    named = re.fullmatch("[0-9a-f]{40,64}", commit)
    is_here = named and git("worktree", "add", "--detach", str(folder), commit, folder=repository) is not None
    changed = "" if version.tags.get("tree_clean") == "true" else ", with changes that were not committed"
    try:
        if (not is_here or changed) and _fingerprint_here(files) == fingerprint:
            print(f"training with the present code, which has the same fingerprint {fingerprint}", flush=True)
            yield SOURCE_ROOT
        elif is_here:
            print(f"training with the code of commit {commit}; the version was trained with it{changed}", flush=True)
            yield folder
        else:
            raise InputError(
                f"{label_of(version)} cannot be trained again: commit {commit} cannot be checked out in {repository}, "
                f"and the present code does not have the fingerprint {fingerprint}: restore the code that trained it"
            )
    finally:
        git("worktree", "remove", "--force", str(folder), folder=repository)


def _train(code: Path, project: Path, stop: StopSignals) -> None:
    """Run the stage `train` in `project`, and wait for it and its recorder. Exits with its code if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    environment |= {
        "PYTHONPATH": search_path(code, "PYTHONPATH"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
        "DVC_STAGE": "train",  # the stage then ends when this process dies
    }
    command = [sys.executable, "-m", "stages.train"]
    # In its own process group: Ctrl-C reaches only this process, which ends the training.
    process = subprocess.Popen(command, cwd=project, env=environment, process_group=0)
    try:
        while process.poll() is None and stop.received is None:
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
        for lock in project.glob(f"checkpoints/*/{RECORDER_LOCK}"):
            with locked(lock, wait=True):  # until the recorder has sent everything
                pass
    if stop.received is not None:
        name = signal.Signals(stop.received).name
        raise Interrupted(f"{name} ended the training, its files are removed: repeat the command", stop.received)
    if process.returncode < 0:
        raise Interrupted(f"signal {-process.returncode} ended the training: repeat the command", -process.returncode)
    if process.returncode:
        sys.exit(process.returncode)
