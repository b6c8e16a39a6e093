"""A version is trained again with its own commit, parameters and tokens, in a temporary folder that is removed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures_mlflow import _cheap_versions, root_of  # noqa: F401 (a fixture)
from fixtures_registry import _keep_threads, _name, add_version, alter, write_version  # noqa: F401 (fixtures)

from pipeline.config.recipes import apply_recipe
from pipeline.config.sections import RegistryConfig
from pipeline.data.encode import write_tokens
from pipeline.data.tokenizer import load_tokenizer
from pipeline.registry import reproduce
from pipeline.registry.catalog import find_version, identity_of
from pipeline.registry.register import register
from pipeline.registry.reproduce import retrain
from pipeline.system.errors import InputError, IntegrityError, Interrupted
from pipeline.system.files import sha256_file, write_json
from pipeline.system.signals import StopSignals
from tests.trainings import change
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

# Replaces the real stage.
STAGE = """
import os, sys, time
from pathlib import Path

assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{Path.cwd()}/mlflow.db"
assert not {"DVC_ROOT", "MLFLOW_RUN_ID"} & os.environ.keys()
exec(os.environ["BEHAVIOUR"])
"""


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    return subprocess.check_output(["git", "-C", str(folder), *identity, *arguments], text=True).strip()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are created."""
    (folder := tmp_path / "temporary files").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def repository(tmp_path, commit_all):
    """A clone with the stage above, committed."""
    folder = tmp_path / "a clone with späces"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages" / "train.py").write_text(STAGE)
    commit_all(folder)
    return folder


@pytest.fixture
def version(store, name, bpe, tokenizer, repository, tmp_path):
    """A version of the commit in `repository`, with an identity."""
    folder, commit = write_version(tmp_path / "version", bpe, tokenizer), git(repository, "rev-parse", "HEAD")
    version = add_version(store, name, folder, git_commit=commit, tree_clean="true")
    store.client.log_dict(version.run_id, {"sources": {}, "environment": {"threads": 2}}, "identity.json")
    return version


def assert_nothing_remains(repository, temporary):
    assert not list(temporary.iterdir())
    assert git(repository, "worktree", "list").count("\n") == 0


COPIED = {  # file of the new training -> file of the version; old commits read data/bpe
    "params.yaml": "params.yaml",
    "data/tokens/train-00000.bin": "tokens/train-00000.bin",
    "data/tokenizer/vocab.bpe": "model/vocab.bpe",
    "data/bpe/encoder.json": "model/encoder.json",
}


def test_only_the_same_weights_are_accepted(store, version, repository, temporary, monkeypatch):
    folder, weights = Path(version.source) / "artifacts", b"other"
    same, again = version.tags["fingerprint"], {}

    def train(code, project, _stop):
        assert (code / "stages" / "train.py").read_text() == STAGE
        for place, source in COPIED.items():
            assert (project / place).read_bytes() == (folder / source).read_bytes()
        write_json(project / "models" / "run.json", again)
        (project / "models" / "model").mkdir()
        (project / "models" / "model" / "model.safetensors").write_bytes(weights)

    monkeypatch.setattr(reproduce, "_train", train)
    expected = sha256_file(folder / "model" / "model.safetensors")
    for fingerprint, threads, reason in (
        ("another", 4, f"its fingerprint is another instead of {same}"),
        (same, 4, r"the environment differs \(threads 2 -> 4\)"),
        (same, 2, "the environment is the same, so the training is not deterministic"),
    ):
        again |= {"fingerprint": fingerprint, "environment": {"threads": threads}}
        with pytest.raises(IntegrityError, match=rf"SHA-256 [0-9a-f]{{64}} instead of {expected}: {reason}"):
            retrain(store, version, repository)
    weights = (folder / "model" / "model.safetensors").read_bytes()
    line = f"{version.name} version 1 trained again: the same weights bit for bit, SHA-256 {expected}"
    assert retrain(store, version, repository) == line
    assert_nothing_remains(repository, temporary)

    monkeypatch.setattr(reproduce, "_train", None)
    changes = ["processes 2 -> 1 after step 7"]
    store.client.log_dict(version.run_id, {**identity_of(store, version), "inexact": changes}, "identity.json")
    with pytest.raises(InputError, match=r"resumed inexactly \(processes 2 -> 1 after step 7\)"):
        retrain(store, version, repository)
    alter(folder / "params.yaml")
    with pytest.raises(IntegrityError, match=r"params\.yaml is altered"):
        retrain(store, version, repository)


@pytest.mark.parametrize(
    ("commit", "tree_clean", "same_fingerprint", "code"),
    [
        ("recorded", "true", False, "commit"),
        ("recorded", "false", False, "commit"),  # only other files were changed
        ("recorded", "false", True, "present"),
        ("0" * 40, "true", True, "present"),
        ("0" * 40, "true", False, "refused"),
        ("HEAD", "true", False, "refused"),  # git knows it, but no version has such a tag
        ("no git", "true", False, "refused"),
        ("no repository", "true", False, "refused"),
    ],
)
def test_which_code_trains(commit, tree_clean, same_fingerprint, code, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "_fingerprint_here", lambda _files: "same" if same_fingerprint else "other")
    recorded = git(repository, "rev-parse", "HEAD")
    tags = {"git_commit": commit if commit in ("0" * 40, "HEAD") else recorded, "tree_clean": tree_clean}
    version = SimpleNamespace(name="x", version="1", tags=tags | {"fingerprint": "same"})
    if commit == "no git":
        monkeypatch.setenv("PATH", "")
    where = tmp_path / "nowhere" if commit == "no repository" else repository
    checkout = reproduce._checkout(version, tmp_path, where, tmp_path / "code")
    if code == "refused":
        with pytest.raises(InputError, match=f"commit .* cannot be checked out in {where}, and the present code"):
            checkout.__enter__()
        assert not capsys.readouterr().out
    else:
        with pytest.raises(KeyError), checkout as path:  # a training that fails
            assert path == (tmp_path / "code" if code == "commit" else reproduce.SOURCE_ROOT)
            raise KeyError
        used = "the present code" if code == "present" else f"the code of commit {recorded}"
        line = capsys.readouterr().out
        assert line.startswith(f"training with {used}")
        assert ("not committed" in line) == (code == "commit" and tree_clean == "false")
        assert git(repository, "worktree", "list").count("\n") == 0


@pytest.fixture
def train(repository, tmp_path, monkeypatch):
    """Run the stage above, which executes `behaviour`."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))  # the training must not get these two
    monkeypatch.setenv("MLFLOW_RUN_ID", "0")

    def call(behaviour):
        monkeypatch.setenv("BEHAVIOUR", behaviour)
        with StopSignals() as stop:
            reproduce._train(repository, tmp_path, stop)

    return call


def test_a_training_that_fails_or_is_killed_ends_the_command(train, capfd):
    train("pass")
    with pytest.raises(SystemExit) as ended:
        train("sys.exit(print('error: not finite', file=sys.stderr) or 4)")
    assert ended.value.code == 4
    assert capfd.readouterr().err == "error: not finite\n"
    with pytest.raises(Interrupted, match="signal 9 ended the training") as killed:
        train("os.kill(os.getpid(), 9)")
    assert killed.value.exit_code == 137


# Beside the training, as a recorder does it: in its own process group, and for a second after the training has ended.
RECORDER = """
import fcntl, os, time
parent = os.getppid()
os.makedirs("checkpoints/x")
lock = open("checkpoints/x/recorder.lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
os.mkdir("begun")
while os.getppid() == parent:
    time.sleep(0.01)
time.sleep(1)
os.mkdir("sent")
"""


def test_a_signal_ends_the_training_and_its_recorder_may_finish(train, tmp_path, interruptible):
    def send():
        wait_until((tmp_path / "begun").exists, 60)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    start = f"subprocess.Popen([sys.executable, '-c', {RECORDER!r}], process_group=0)"
    with pytest.raises(Interrupted, match="SIGINT ended the training, its files are removed") as raised:
        train(f"import subprocess; {start}; time.sleep(999)")
    sender.join()
    assert raised.value.exit_code == 130
    assert (tmp_path / "sent").exists()


def test_a_real_training_gives_the_same_weights_bit_for_bit(
    store, name, cheap_versions, bpe, commit_all, temporary, tmp_path, monkeypatch, capfd
):
    """Twelve steps on a short text, by the real stage; a later commit breaks it, and a hook is not run."""
    project = tmp_path / "a project with späces"
    for package in ("pipeline", "stages", "recipes"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name_of_file in (".gitignore", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name_of_file, project)
    apply_recipe("smoke", project / "params.yaml", project / "recipes")
    change(project, **{"optim.max_epochs": 10.9, "model.n_embd": 16})  # 12 steps
    commit_all(project)
    shutil.copytree(bpe, project / "data" / "tokenizer")
    (project / "data" / "corpus.txt").write_text("To be, or not to be, that is the question:\n" * 20)
    write_tokens(project / "data" / "corpus.txt", load_tokenizer(bpe), project / "data" / "tokens")
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)  # creating another store takes seconds
    subprocess.run([sys.executable, "-m", "stages.train"], cwd=project, check=True, timeout=300)
    register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))
    expected = sha256_file(project / "models" / "model" / "model.safetensors")
    (project / "stages" / "train.py").write_text("broken")
    git(project, "commit", "-qam", "later")
    hook = project / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch '{tmp_path}/hook'\n")
    hook.chmod(0o755)
    version = find_version(store, name, "1")
    assert retrain(store, version, project).endswith(f"the same weights bit for bit, SHA-256 {expected}")
    assert f"training with the code of commit {version.tags['git_commit']}" in capfd.readouterr().out
    assert not (tmp_path / "hook").exists()
    assert_nothing_remains(project, temporary)
    assert reproduce._fingerprint_here(Path(version.source) / "artifacts") == version.tags["fingerprint"]
