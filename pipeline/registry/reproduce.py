"""Train a registered version once more, and compare the weights bit for bit.

It runs the code of the recorded commit on the version's own parameters and tokens, in a temporary folder with an MLflow
store of its own; nothing of it stays.
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
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.params import load_params
from pipeline.data.token_files import data_sha256
from pipeline.data.tokenizer import tokenizer_in
from pipeline.model.weights import WEIGHTS
from pipeline.registry.artifacts import TEMPORARY, label_of, open_version
from pipeline.registry.catalog import identity_of
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError, IntegrityError, Interrupted
from pipeline.system.files import locked, read_json, sha256_file
from pipeline.system.host import SOURCE_ROOT, git
from pipeline.system.signals import StopSignals
from pipeline.tracking.fingerprint import differences, identify
from pipeline.tracking.mlflow_store import Store
from pipeline.tracking.recorder import RECORDER_LOCK
from pipeline.training.config import RunConfig

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def retrain(store: Store, version: "ModelVersion", repository: Path) -> str:
    """Train what `version` is once more; return, in a line, that the weights are the same bit for bit.

    Raises IntegrityError where they are not; InputError where the code that trained it is not in `repository`;
    Interrupted after a signal. Where the training itself fails, its own line and exit code are the result.
    """
    label, files = label_of(version), open_version(store, version)
    expected = sha256_file(files / "model" / WEIGHTS)
    recorded = identity_of(store, version)
    if changes := recorded.get("inexact"):
        raise InputError(f"{label} was trained with --elastic ({'; '.join(changes)}): no other training can equal it")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder, StopSignals() as stop:
        project = _set_up(files, Path(folder) / "project")
        with _code_of(version, files, repository, Path(folder) / "code") as code:
            _train(code, project, stop)
        found = sha256_file(project / "models" / "model" / WEIGHTS)
        again = read_json(project / "models" / "run.json")
    if found == expected:
        return f"{label} trained again: the same weights bit for bit, SHA-256 {found}"
    if again["fingerprint"] != version.tags["fingerprint"]:
        why = f"it is another training, {again['fingerprint']} instead of {version.tags['fingerprint']}"
    elif changed := differences(recorded["environment"], again["environment"]):
        why = f"this machine is another ({', '.join(changed)})"
    else:
        why = "the machine is the same, so something in the training is not deterministic"
    raise IntegrityError(f"{label} trained again has other weights, SHA-256 {found} instead of {expected}: {why}")


def _fingerprint_here(files: Path) -> str | None:
    """None where the present code does not know the version's parameters."""
    try:
        config = RunConfig.of(load_params(files / "params.yaml"))
    except InputError:
        return None
    return identify(data_sha256(files / "tokens"), config.decisive, prepare_machine(config.train))["fingerprint"]


def _set_up(files: Path, project: Path) -> Path:
    shutil.copytree(files / "tokens", project / "data" / "tokens")
    for folder in ("tokenizer", "bpe"):  # commits before `corpus.tokenizer` read data/bpe
        (project / "data" / folder).mkdir()
        for name in tokenizer_in(files / "model").files:
            shutil.copyfile(files / "model" / name, project / "data" / folder / name)
    shutil.copyfile(files / "params.yaml", project / "params.yaml")
    return project


@contextmanager
def _code_of(version: "ModelVersion", files: Path, repository: Path, folder: Path) -> Iterator[Path]:
    """The code that trained a version: its commit, checked out into `folder`.

    Where that is missing, or was changed without a commit, it is the present code if the fingerprint is the same.
    """
    commit, fingerprint = version.tags.get("git_commit", "unknown"), version.tags["fingerprint"]
    named = re.fullmatch("[0-9a-f]{40,64}", commit)
    is_here = named and git("worktree", "add", "--detach", str(folder), commit, folder=repository) is not None
    changed = "" if version.tags.get("tree_clean") == "true" else ", with changes that were not committed"
    try:
        if (not is_here or changed) and _fingerprint_here(files) == fingerprint:
            print(f"training with the present code, whose fingerprint {fingerprint} is the same", flush=True)
            yield SOURCE_ROOT
        elif is_here:
            print(f"training with the code of commit {commit}; the version was trained with it{changed}", flush=True)
            yield folder
        else:
            raise InputError(
                f"{label_of(version)} cannot be trained again: commit {commit} cannot be checked out in {repository}, "
                f"and the present code has another fingerprint than {fingerprint}: bring back the code that trained it"
            )
    finally:
        git("worktree", "remove", "--force", str(folder), folder=repository)


def _train(code: Path, project: Path, stop: StopSignals) -> None:
    """Run the stage `train` in `project`, and wait for it and its recorder. Ends the command where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
        "DVC_STAGE": "train",  # so that it ends with this process, as it does with DVC
    }
    command = [sys.executable, "-m", "stages.train"]
    # In a group of its own: Ctrl-C comes to this process, which ends that one.
    process = subprocess.Popen(command, cwd=project, env=environment, process_group=0)
    try:
        while process.poll() is None and stop.received is None:
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
        for lock in project.glob(f"checkpoints/*/{RECORDER_LOCK}"):
            with locked(lock, wait=True):  # a recorder that still sends
                pass
    if stop.received is not None:
        name = signal.Signals(stop.received).name
        raise Interrupted(f"{name} while training again: nothing of it stays, repeat it", stop.received)
    if process.returncode < 0:
        raise Interrupted(f"signal {-process.returncode} ended the training: repeat it", -process.returncode)
    if process.returncode:
        sys.exit(process.returncode)
