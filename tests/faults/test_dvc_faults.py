"""A stage that dies: no half file under a final name, and what DVC started ends with DVC."""

import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config.recipes import apply_recipe
from pipeline.data import tokenizer
from pipeline.system import files, signals
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.files import UNFINISHED, sha256_file
from pipeline.training import train as tracked
from tests.trainings import Untracked

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TIMED = {"times.jsonl", "timing.json", "speed.png"}  # their bytes differ from run to run
DIED = 77


def environment(**extra):
    own = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    return {**own, "PYTHONPATH": str(ROOT), **extra}


# A stage that dies midway (B7)


def outputs(name):
    """The files that stage `name` has written under their final names, by path."""
    outs = STAGES[name].get("outs", []) + STAGES[name].get("metrics", [])
    roots = [Path(out if isinstance(out, str) else next(iter(out))) for out in outs]
    found = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file()]
    return {path: content(path) for path in found if not any(part.startswith(UNFINISHED) for part in path.parts)}


def content(path):
    """What must be the same each time: the file's hash, or, where it holds times, the keys of its whole rows."""
    if path.name not in TIMED:
        return sha256_file(path)
    if path.suffix == ".png":
        return path.read_bytes()[-8:]  # the end of every PNG
    text = path.read_text()
    assert text.endswith("\n"), f"{path} is cut off"
    return [sorted(json.loads(row)) for row in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def remove_outputs(name):
    """As DVC does before it runs a stage."""
    for path in outputs(name):
        path.unlink()


def die_at(call):
    """Have this process die at its `call`-th call that touches the disk; a file that is just written stays half."""
    left = iter(range(call - 1, -1, -1))

    def deadly(owner, name, half_written):
        original = getattr(owner, name)

        def wrapper(*arguments, **named):
            if next(left, None) == 0:
                if half_written:
                    path, text = arguments[:2]
                    original(path, text[: len(text) // 2], **named)
                os._exit(DIED)
            return original(*arguments, **named)

        setattr(owner, name, wrapper)

    for owner, name in ((os, "replace"), (os, "rename"), (files, "fsync"), (files, "write_manifest")):
        deadly(owner, name, half_written=False)
    deadly(Path, "write_text", half_written=True)


def die_everywhere(name, stride):
    """Let stage `name` die at call 1, 1 + stride, ... until it survives; then its outputs equal those of a clean run.

    Each death is a child's: this process never trains, for torch's threads do not survive a fork.
    """
    main = import_module(f"stages.{name}").main
    tracked.Recorder = Untracked
    tokenizer.fetch = lambda sources, path, sha256: shutil.copyfile(
        Path(os.environ["BPE"], sources[0].split("/")[-1]), path
    )

    torch.optim.AdamW([torch.zeros(1)])  # once for all children: the first optimiser imports for a second

    def code_of_child(call):
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if call:
            die_at(call)
        os._exit(exit_code_of(main))

    assert code_of_child(None) == 0
    clean, deaths = outputs(name), 0
    assert clean
    shutil.rmtree("checkpoints", ignore_errors=True)  # so that training, too, starts from step 0
    while True:
        remove_outputs(name)
        code = code_of_child(1 + stride * deaths)
        left = outputs(name)
        assert all(found == clean[path] for path, found in left.items()), f"half written at call {1 + stride * deaths}"
        if code != DIED:
            break
        deaths += 1
    assert (code, left.keys()) == (0, clean.keys())
    assert not [path for place in ("data", "models", "reports") for path in Path(place).rglob(f"{UNFINISHED}*")]
    print(f"died {deaths} times")


@pytest.fixture(scope="module")
def project(tmp_path_factory, bpe, shakespeare):
    """A workspace with a short text; the stages' tests run in their order and leave it to the next."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "texts").mkdir()
    (folder / "texts" / "mine.txt").write_bytes(shakespeare.read_bytes()[:4000])
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["corpus"].update(source="texts/mine.txt", sha256=None, mirrors=[], fraction=1.0)
    params["model"].update(n_layer=1, n_embd=16, block_size=32)
    params["windows"].update(seq_len=32)
    params["optim"].update(max_tokens=128 * 4)  # 4 steps
    params["train"].update(threads=1, precision="fp32")
    params["samples"].update(max_tokens=2)
    params["evaluate"].update(recall_places=2)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stride", "at_least"),
    [
        ("download", 1, 4),
        ("download_tokenizer", 1, 5),
        ("tokenize", 1, 9),
        ("train", 1, 20),
        ("evaluate", 1, 6),
        ("plot", 9, 2),
    ],
)
def test_a_stage_that_dies_anywhere_leaves_no_half_file_and_then_ends_as_a_clean_run(
    project, bpe, name, stride, at_least
):  # B7
    program = f"from tests.faults.test_dvc_faults import die_everywhere; die_everywhere({name!r}, {stride})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project,
        env=environment(BPE=str(bpe)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[1]) >= at_least


# What DVC started ends with DVC (A10)

PARENT = """if True:
    import subprocess, sys
    subprocess.Popen([sys.executable, "-c", sys.argv[1]])
    sys.stdin.read()
    """
CHILD = """if True:
    import os, signal, sys
    from pipeline.system.entrypoint import die_with_dvc
    signal.signal(signal.SIGTERM, lambda *_: (print("told to stop", flush=True), sys.exit()))
    die_with_dvc()
    print("ready", flush=True)
    for line in open(os.environ["FIFO"]):
        print("heard", flush=True)
    """


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("started_by_dvc", [True, False])
def test_only_what_dvc_started_is_told_when_its_parent_is_killed(started_by_dvc, tmp_path):  # A10
    os.mkfifo(fifo := tmp_path / "fifo")
    extra = {"FIFO": str(fifo), **({"DVC_STAGE": "train"} if started_by_dvc else {})}
    command, pipe = [sys.executable, "-c", PARENT, CHILD], subprocess.PIPE
    with subprocess.Popen(command, env=environment(**extra), text=True, stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout.readline() == "ready\n"
        with fifo.open("w") as line:  # waits for the child to open its end
            parent.kill()
            parent.wait()
            if not started_by_dvc:
                line.write("are you there?\n")
        assert parent.stdout.read() == ("told to stop\n" if started_by_dvc else "heard\n")  # up to the child's end


def test_a_parent_that_died_before_the_call_is_noticed(monkeypatch):  # A10
    parents, sent = iter([41, 1]), []
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(signals.sys, "platform", "linux")
    monkeypatch.setattr(signals.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(signals.os, "kill", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda _: Namespace(prctl=lambda *_: 0))
    signals.die_with_dvc()
    assert sent == [(os.getpid(), signal.SIGTERM)]
