"""Training a version again: from its own commit, parameters and tokens, elsewhere, and nothing of it stays."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import torch
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.config.sections import RegistryConfig
from pipeline.data.encode import write_tokens
from pipeline.data.token_files import data_sha256
from pipeline.data.tokenizer import load_tokenizer
from pipeline.registry import reproduce as retraining
from pipeline.registry.catalog import find_version, identity_of
from pipeline.registry.register import register
from pipeline.registry.reproduce import retrain
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError, IntegrityError, Interrupted, ModelMissing
from pipeline.system.files import read_json, sha256_file, write_json, write_manifest
from pipeline.tracking.fingerprint import identify
from pipeline.training.config import RunConfig
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

# A stage in place of the real one: its weights are a hash of itself and of all that a training reads.
STAGE = """
import hashlib, json, os, sys, time
from pathlib import Path

assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{Path.cwd()}/mlflow.db"
assert not {"DVC_ROOT", "MLFLOW_RUN_ID"} & os.environ.keys()
if behaviour := os.environ.get("BEHAVIOUR"):
    exec(behaviour)
bpe = "data/bpe" if Path("data/bpe").exists() else "data/tokenizer"  # commits before `corpus.tokenizer` read data/bpe
read = ["params.yaml", "data/tokens/train-00000.bin", f"{bpe}/vocab.bpe", f"{bpe}/encoder.json", __file__]
weights = b"".join(hashlib.sha256(Path(path).read_bytes()).digest() for path in read)
Path("models/model").mkdir(parents=True, exist_ok=True)
Path("models/model/model.safetensors").write_bytes(weights)
if not Path("models/run.json").exists():
    environment = {"threads": 2, "torch": "2.13"}
    record = {"fingerprint": os.environ.get("FINGERPRINT", "another"), "environment": environment}
    Path("models/run.json").write_text(json.dumps(record))
"""


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    return subprocess.check_output(["git", "-C", str(folder), *identity, *arguments], text=True).strip()


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary files"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def repository(tmp_path):
    """A clone with the stage above, committed."""
    folder = tmp_path / "a clone with späces"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages" / "train.py").write_text(STAGE)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return folder


@pytest.fixture
def version(store, repository, tmp_path, monkeypatch, cheap_versions):
    """A version that the stage above has trained, in a clean checkout of its commit, on this machine."""
    project = trained_project(tmp_path / "project")
    params = (ROOT / "params.yaml").read_text().replace("seed: 1", f"seed: {uuid4().int % 10**9}")
    (project / "params.yaml").write_text(params)  # a run that no other test has
    (bpe := project / "data" / "tokenizer").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (bpe / name).write_text(name)
        shutil.copy(bpe / name, project / "models" / "model")
    config = RunConfig.of(load_params(project / "params.yaml"))
    machine = prepare_machine(config.train, config.flops)
    identity = identify(data_sha256(project / "data" / "tokens"), config.decisive, machine)
    write_json(project / "models" / "run.json", {**read_json(project / "models" / "run.json"), **identity})
    environment = {**os.environ, "PYTHONPATH": str(repository), "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    subprocess.run([sys.executable, "-m", "stages.train"], cwd=project, env=environment, check=True, timeout=60)
    (project / "models" / "model" / "manifest.json").unlink()
    (project / "reports" / "metrics.json").unlink()  # of another run; nothing asks for it
    write_manifest(project / "models" / "model")
    monkeypatch.chdir(repository)  # whose commit the run then has
    name = f"model-{uuid4().hex[:8]}"
    register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))  # neither of which a training must get
    monkeypatch.setenv("MLFLOW_RUN_ID", "0")
    return find_version(store, name, "1")


def tagged(store, version, **tags):
    for key, value in tags.items():
        store.client.set_model_version_tag(version.name, version.version, key, value)
    return find_version(store, version.name, str(version.version))


def weights_of(version):
    return sha256_file(Path(version.source) / "artifacts" / "model" / "model.safetensors")


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_nothing_stays(repository, temporary):
    assert not list(temporary.iterdir())
    assert git(repository, "worktree", "list").count("\n") == 0
    assert not git(repository, "status", "--porcelain")


def test_the_recorded_commit_trains_the_same_weights_and_nothing_stays(
    store, version, repository, temporary, tmp_path, capfd
):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "stages" / "train.py").write_text(STAGE + "# changed since")
    git(repository, "commit", "-qam", "later")
    hook = repository / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch '{tmp_path}/hook'\n")
    hook.chmod(0o755)
    said = retrain(store, version, repository)
    assert (
        said == f"{version.name} version 1 trained again: the same weights bit for bit, SHA-256 {weights_of(version)}"
    )
    assert capfd.readouterr().out.startswith(f"training with the code of commit {commit}")
    assert not (tmp_path / "hook").exists()
    assert_nothing_stays(repository, temporary)


@pytest.mark.fault
@pytest.mark.parametrize("same_run", [False, True])
def test_other_weights_are_told_with_both_hashes(same_run, store, version, repository, temporary, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "Path('params.yaml').write_text('other')")
    monkeypatch.setenv("FINGERPRINT", version.tags["fingerprint"] if same_run else "another")
    identity = {**identity_of(store, version), "environment": {"threads": 2, "torch": "2.13"}}
    store.client.log_dict(version.run_id, identity, "identity.json")
    found = "is not deterministic" if same_run else "it is another training, another instead of"
    with pytest.raises(IntegrityError, match=f"SHA-256 [0-9a-f]{{64}} instead of {weights_of(version)}: .*{found}"):
        retrain(store, version, repository)
    assert_nothing_stays(repository, temporary)


def test_another_machine_is_named_where_the_weights_differ(store, version, repository, temporary, monkeypatch):
    identity = identity_of(store, version)
    monkeypatch.setenv("BEHAVIOUR", "Path('params.yaml').write_text('other')")
    monkeypatch.setenv("FINGERPRINT", version.tags["fingerprint"])
    store.client.log_dict(version.run_id, {**identity, "environment": {"threads": 64, "torch": "1.0"}}, "identity.json")
    with pytest.raises(IntegrityError, match=r"this machine is another \(threads 64 -> 2, torch 1\.0 -> 2\.13\)"):
        retrain(store, version, repository)


def test_what_was_trained_on_changing_machines_is_not_trained_again(store, version, repository, temporary):
    changes = ["processes 2 -> 1 after step 7"]
    store.client.log_dict(version.run_id, {**identity_of(store, version), "inexact": changes}, "identity.json")
    with pytest.raises(InputError, match=r"trained with --elastic \(processes 2 -> 1 after step 7\)"):
        retrain(store, version, repository)
    assert_nothing_stays(repository, temporary)


def test_where_only_other_files_were_changed_the_commit_is_the_code(store, version, repository, temporary, capfd):
    (repository / "stages" / "train.py").write_text("another")
    git(repository, "commit", "-qam", "later")
    assert "the same weights bit for bit" in retrain(
        store, tagged(store, version, tree_clean="false", fingerprint="other"), repository
    )
    assert capfd.readouterr().out.startswith(f"training with the code of commit {version.tags['git_commit']}")


UNKNOWN = [
    {"git_commit": "0" * 40},
    {"git_commit": "unknown", "tree_clean": "unknown"},
    {"git_commit": "HEAD"},
]


@pytest.mark.fault
@pytest.mark.parametrize("tags", [*UNKNOWN, {"tree_clean": "false"}])
def test_without_its_commit_the_present_code_trains_where_it_is_the_same(
    tags, store, version, repository, temporary, monkeypatch, capfd
):
    monkeypatch.setattr(retraining, "SOURCE_ROOT", repository)  # the present code
    assert "the same weights bit for bit" in retrain(store, tagged(store, version, **tags), repository)
    assert capfd.readouterr().out.startswith("training with the present code, whose fingerprint")
    assert_nothing_stays(repository, temporary)


@pytest.mark.fault
@pytest.mark.parametrize("tags", UNKNOWN)
def test_without_its_commit_other_code_is_refused(tags, store, version, repository, temporary, capfd):
    with pytest.raises(InputError, match=r"cannot be trained again: commit .* another fingerprint than other"):
        retrain(store, tagged(store, version, **tags, fingerprint="other"), repository)
    assert not capfd.readouterr().out
    assert_nothing_stays(repository, temporary)


@pytest.mark.fault
@pytest.mark.parametrize("path", ["", os.environ["PATH"]])
def test_without_git_or_a_clone_the_present_code_is_looked_at(path, store, version, tmp_path, temporary, monkeypatch):
    monkeypatch.setenv("PATH", path)
    with pytest.raises(InputError, match=f"cannot be checked out in {tmp_path / 'nowhere'}, and the present code"):
        retrain(store, tagged(store, version, fingerprint="other"), tmp_path / "nowhere")


@pytest.mark.fault
def test_an_altered_version_is_not_trained_again(store, version, repository, temporary):
    (Path(version.source) / "artifacts" / "params.yaml").write_text("train: {}")
    with pytest.raises(IntegrityError, match=r"params\.yaml is altered"):
        retrain(store, version, repository)
    shutil.rmtree(Path(version.source) / "artifacts")
    with pytest.raises(ModelMissing, match=version.name):
        retrain(store, version, repository)


@pytest.mark.fault
def test_a_training_that_fails_ends_with_its_own_line_and_code(
    store, version, repository, temporary, monkeypatch, capfd
):
    monkeypatch.setenv("BEHAVIOUR", "sys.exit(print('error: not finite', file=sys.stderr) or 4)")
    with pytest.raises(SystemExit) as ended:
        retrain(store, version, repository)
    assert ended.value.code == 4
    assert capfd.readouterr().err == "error: not finite\n"
    assert_nothing_stays(repository, temporary)


@pytest.mark.fault
def test_a_training_that_is_killed_is_told(store, version, repository, temporary, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "os.kill(os.getpid(), 9)")
    with pytest.raises(Interrupted, match="signal 9 ended the training") as told:
        retrain(store, version, repository)
    assert told.value.exit_code == 137
    assert_nothing_stays(repository, temporary)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_the_training_and_its_recorder_along(
    number, store, version, repository, temporary, tmp_path, monkeypatch, interruptible
):
    """The recorder is in a process group of its own, as the real one is, and would make its folder anew."""
    loop = "while os.getppid() == parent:\n time.sleep(0.01)\ntime.sleep(1)\nos.makedirs('sent')"
    hold = "os.makedirs('checkpoints/x')\nlock = open('checkpoints/x/recorder.lock', 'a')"
    begin = f"import fcntl, os, time\nparent = os.getppid()\n{hold}\nfcntl.flock(lock, fcntl.LOCK_EX)"
    recorder = f"{begin}\n{loop}"
    start = f"import subprocess; beside = subprocess.Popen([sys.executable, '-c', {recorder!r}], process_group=0)"
    wait = "while not os.path.exists('checkpoints/x/recorder.lock'):\n time.sleep(0.01)"
    note = f"Path({str(tmp_path / 'pid')!r}).write_text(str(beside.pid)); Path({str(tmp_path / 'begun')!r}).touch()"
    monkeypatch.setenv("BEHAVIOUR", f"{start}\n{wait}\n{note}\ntime.sleep(999)")

    def send():
        wait_until((tmp_path / "begun").exists, 60)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    sent, sender = [], threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupted, match="nothing of it stays") as told:
        retrain(store, version, repository)
    sender.join()
    assert time.monotonic() - sent[0] < 30  # it would sleep for 999 s
    assert told.value.exit_code == 128 + number
    assert wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())), 60)  # which would make its folder anew
    assert_nothing_stays(repository, temporary)


@pytest.mark.slow
def test_a_real_training_gives_the_same_weights_bit_for_bit(bpe, tmp_path):
    """The smoke recipe on a short text: trained, registered, and trained again by the command."""
    project = tmp_path / "a project with späces"
    tracked = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, tracked.decode().split("\0")):
        if (
            name.startswith(("pipeline/", "stages/", "recipes/", "params.yaml", ".gitignore"))
            and (ROOT / name).is_file()
        ):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    apply_recipe("smoke", project / "params.yaml", project / "recipes")
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "x")
    shutil.copytree(bpe, project / "data" / "tokenizer")
    (project / "data" / "corpus.txt").write_text("To be, or not to be, that is the question:\n" * 20)
    write_tokens(project / "data" / "corpus.txt", load_tokenizer(bpe), project / "data" / "tokens")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC"))}

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=project, env=inherited, capture_output=True, text=True, timeout=600
        )

    assert run("stages.train").returncode == 0
    assert run("stages.register").returncode == 0
    done = run("pipeline", "models", "verify", "1", "--retrain")
    assert done.returncode == 0, done.stderr
    assert "training with the code of commit" in done.stdout
    expected = sha256_file(project / "models" / "model" / "model.safetensors")
    assert done.stdout.splitlines()[-1].endswith(f"the same weights bit for bit, SHA-256 {expected}")
    assert git(project, "worktree", "list").count("\n") == 0
