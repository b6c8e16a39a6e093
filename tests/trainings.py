"""What tests of trainings share: a workspace with a run of 12 steps, and ways to start, interrupt and compare it."""

import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from pipeline.config.recipes import apply_recipe
from pipeline.data.token_files import count_tokens
from pipeline.system.files import sha256_file
from pipeline.tracking.journal import TIMES, Journal

ROOT = Path(__file__).parent.parent
STEPS = 12  # of 256 tokens; the target is out of reach, so that a run takes all of them


class Untracked:
    """Replaces the recorder where MLflow is not tested."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def recording(self, *arguments):
        return nullcontext()


class Killed(BaseException):
    """Ends a training in this process as SIGKILL would: the product catches no such exception."""


def change(folder, **values):
    """Set dotted keys, such as `optim.lr`, in `folder`/params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in values.items():
        section, name = key.split(".")
        params[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def epochs(folder, steps, step_tokens=256):
    """The change that gives a run on the tokens in `folder` a budget of `steps` steps."""
    return {"optim.max_epochs": steps * step_tokens / count_tokens(folder / "data" / "tokens")}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, bpe, tokenizer, shakespeare):
    """A workspace of the smoke recipe with its tokens: a short run that saves a checkpoint after every third step."""
    from pipeline.data.encode import write_tokens

    folder = tmp_path_factory.mktemp("prepared")
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    write_tokens(shakespeare, tokenizer, folder / "data" / "tokens", fraction=0.005)
    short = {**epochs(folder, STEPS), "checkpoint.interval_steps": 3, "samples.max_tokens": 5}
    change(folder, **short, **{"model.dropout": 0.1, "train.threads": 1})
    return folder


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch):
    """A copy of `prepared`, as the working directory of a test without MLflow."""
    shutil.copytree(prepared, folder := tmp_path / "a project with späces, 文字 and 🎭")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("pipeline.training.train.Recorder", Untracked)
    return folder


@pytest.fixture(scope="session")
def straight(prepared, tmp_path_factory):
    """A workspace in which the run was trained without an interruption."""
    shutil.copytree(prepared, folder := tmp_path_factory.mktemp("straight") / "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pipeline.training.train.Recorder", Untracked)
        train()
    return folder


def train(elastic=False):
    """Run the stage `train` in the working directory."""
    from pipeline.config.params import load_params
    from pipeline.training.train import run_tracked

    run_tracked(load_params(), Path("data"), Path("models"), Path("reports/timing.json"), elastic)


def run_folder(workspace=Path()):
    folders = (path for path in (workspace / "checkpoints").iterdir() if path.is_dir() and not path.suffix)
    (folder,) = (path for path in folders if path.name != "jobs")  # of jobs on Slurm
    return folder


def bits(workspace=Path()):
    """Hashes of what must be equal: model, results, journal and the last checkpoint."""
    last = max(run_folder(workspace).glob("step-*"))
    paths = [workspace / "models" / name for name in ("model/model.safetensors", "run.json", "steps.jsonl")]
    return {f"{path.parent.name}/{path.name}": sha256_file(path) for path in [*paths, *last.iterdir()]}


def n_steps(workspace=Path()):
    """The number of steps in the journal of the only run, whose folder need not exist yet."""
    return sum(path.read_text().count("\n") for path in (workspace / "checkpoints").glob(f"*/{TIMES}"))


def at_step(patch, step, act):
    """Call `act` as soon as the journal has the record of `step`."""
    append = Journal.append

    def acting(journal, record):
        append(journal, record)
        if record.step == step:
            act()

    patch.setattr(Journal, "append", acting)


def train_until_killed(after_step):
    def die():
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, after_step, die)
        train()


# Processes. A fork of a server that has imported torch starts within a moment; a new interpreter takes seconds.


def start(do, *arguments, **environment):
    """Run `do` as a stage in another process and in the working directory; `output_of` reads its output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.training.train", "tests.trainings"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # for the server, at its start
        # a daemon: pytest terminates it at its end if a test has failed before
        process = context.Process(target=_as_stage, args=(do, arguments, environment), daemon=True)
        process.start()
    return process


def _as_stage(do, arguments, environment):
    from pipeline.system.entrypoint import run_stage
    from pipeline.training import train as training

    os.environ.update(environment)
    training.Recorder = Untracked
    output = os.open(f"process-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1)  # prints what each thread does
    run_stage(lambda: do(*arguments))


def output_of(process):
    return Path(f"process-{process.pid}.log").read_text()


def end(process):
    """Wait for a process that ends by itself; return its exit code. One that hangs prints where, and fails the test."""
    process.join(180)
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        process.join(2)
        state = Path(f"/proc/{process.pid}/status").read_text() if sys.platform == "linux" else ""
        process.kill()
        pytest.fail(f"process {process.pid} does not end: {state}{output_of(process)}")
    return process.exitcode


def start_world(size, do, *arguments):
    """Start the processes of one training, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    place |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [start(do, *arguments, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]
