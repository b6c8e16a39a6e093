"""A stage that dies leaves no half-written file, and a stage ends with the DVC process that started it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from pipeline.config.recipes import apply_recipe
from pipeline.data import tokenizer
from pipeline.system import files, signals
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.files import UNFINISHED, sha256_file
from pipeline.training import train as tracked
from tests.trainings import Untracked, change

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
    """What must be the same each time: the file's hash, or, where it holds times, the keys of its records."""
    if path.name not in TIMED:
        return sha256_file(path)
    if path.suffix == ".png":
        return path.read_bytes()[-8:]  # the end of every PNG
    text = path.read_text()
    assert text.endswith("\n"), f"{path} is cut off"
    return [sorted(json.loads(row)) for row in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def remove_outputs(name):
    """Remove what a stage has written, as DVC does before it runs the stage."""
    for path in outputs(name):
        path.unlink()


def die_at(call):
    """Let this process die at its `call`-th call that touches the disk, and leave half of a file that it writes."""
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


AT_LEAST = {
    "download": 4,
    "tokenizer": 5,
    "tokenize": 9,
    "train": 20,
    "evaluate": 6,
    "plot": 18,
}  # calls that touch the disk
STRIDES = {
    "download": 1,
    "tokenizer": 1,
    "tokenize": 2,
    "train": 4,
    "evaluate": 1,
    "plot": 9,
}  # of all calls, which ones are deadly


def die_everywhere():
    """Let each stage die at call 1, 1 + stride, ... until it survives; then its outputs equal those of a clean run.

    Each death is a child's: this process never trains, for torch's threads do not survive a fork.
    """
    tracked.Recorder = Untracked
    tokenizer.fetch = lambda sources, path, _: shutil.copyfile(Path(os.environ["BPE"], sources[0].split("/")[-1]), path)
    for name in ("data.encode", "data.statistics", "model.evaluate", "report.figures", "report.tables"):
        import_module(f"pipeline.{name}")  # once for all children
    for name, stride in STRIDES.items():
        main = import_module(f"stages.{name}").main
        assert code_of_child(main, None) == 0
        clean, call = outputs(name), 1
        assert clean
        shutil.rmtree("checkpoints", ignore_errors=True)  # so that training, too, starts from step 0
        remove_outputs(name)
        while (code := code_of_child(main, call)) == DIED:
            left = outputs(name)
            assert all(found == clean[path] for path, found in left.items()), f"{name}: half written at call {call}"
            remove_outputs(name)
            call += stride
        assert (code, outputs(name)) == (0, clean)
        assert not [path for place in ("data", "models", "reports") for path in Path(place).rglob(f"{UNFINISHED}*")]
        print(f"{name} survived call {call}")


def code_of_child(main, call):
    """Exit code of a child that runs a stage and dies at this call."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if call:
        die_at(call)
    os._exit(exit_code_of(main))


def test_a_stage_that_dies_anywhere_leaves_no_half_file_and_then_ends_as_a_clean_run(tmp_path, bpe, shakespeare):  # B7
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.txt").write_bytes(shakespeare.read_bytes()[:4000])
    shutil.copy(ROOT / "params.yaml", tmp_path)
    apply_recipe("smoke", tmp_path / "params.yaml", ROOT / "recipes")
    corpus = {"source": "texts/mine.txt", "sha256": None, "mirrors": [], "fraction": 1.0}
    change(tmp_path, **{f"corpus.{key}": value for key, value in corpus.items()})
    change(tmp_path, **{"model.n_layer": 1, "model.n_embd": 16, "model.block_size": 32, "windows.seq_len": 32})
    change(tmp_path, **{"optim.max_epochs": 0.4, "train.threads": 1, "train.precision": "fp32"})  # 4 steps
    change(tmp_path, **{"samples.max_tokens": 2, "evaluate.recall_places": 2})
    program = "from tests.faults.test_dvc_faults import die_everywhere; die_everywhere()"
    env = environment(BPE=str(bpe))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    survived = {name: int(call) for name, call in re.findall(r"(\w+) survived call (\d+)", done.stdout)}
    assert survived.keys() == AT_LEAST.keys()
    assert all(survived[name] > calls for name, calls in AT_LEAST.items()), survived


# A stage ends with its DVC process (A10)

PARENT = """if True:
    import subprocess, sys
    subprocess.Popen([sys.executable, "-c", sys.argv[1]])
    sys.stdin.read()
    """
CHILD = """if True:
    import os, signal, sys
    from pipeline.system.entrypoint import die_with_dvc
    signal.signal(signal.SIGTERM, lambda *_: (print("received SIGTERM", flush=True), sys.exit()))
    die_with_dvc()
    print("ready", flush=True)
    for line in open(os.environ["FIFO"]):
        print("heard", flush=True)
    """


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals the death of a parent")
@pytest.mark.parametrize("started_by_dvc", [True, False])
def test_only_what_dvc_started_ends_when_its_parent_is_killed(started_by_dvc, tmp_path):  # A10
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
        assert parent.stdout.read() == ("received SIGTERM\n" if started_by_dvc else "heard\n")  # up to the child's end


def test_a_parent_that_died_before_the_call_is_noticed(monkeypatch):  # A10
    parents, sent = iter([41, 1]), []
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(signals.sys, "platform", "linux")
    monkeypatch.setattr(signals.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(signals.os, "kill", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda _: Namespace(prctl=lambda *_: 0))
    signals.die_with_dvc()
    assert sent == [(os.getpid(), signal.SIGTERM)]
