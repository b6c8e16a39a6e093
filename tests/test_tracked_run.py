"""A run goes on with the same bits after whatever happened to it, and only where it is the same run."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import checkpoint, tracked_run
from pipeline.checkpoint import checkpoint_steps, load_checkpoint, load_model
from pipeline.config import load_params
from pipeline.encode import write_tokens
from pipeline.errors import DivergedError, InputError, IntegrityError, RunLocked
from pipeline.files import locked, sha256_file, sha256_json
from pipeline.interrupt import StopSignals
from pipeline.journal import read_steps
from pipeline.recipes import apply_recipe
from pipeline.run_config import RunConfig
from pipeline.stage import exit_code_of
from pipeline.tracked_run import run_tracked

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parent.parent
STEPS = 60  # of 256 tokens; the target is out of reach, so that every run takes them all


class Untracked:
    """Stands for the recorder where MLflow is beside the point."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bpe, tokenizer, shakespeare):
    """A workspace of the smoke recipe, shortened, with its tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    change(
        folder,
        **{"optim.max_tokens": 256 * STEPS, "record.checkpoint_steps": 7, "model.dropout": 0.1, "train.threads": 1},
    )
    shutil.copytree(bpe, folder / "data" / "bpe")
    write_tokens(shakespeare, tokenizer, folder / "data" / "tokens", fraction=0.005)
    return folder


def change(folder, **values):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in values.items():
        section, name = key.split(".")
        params[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setattr(tracked_run, "Recorder", Untracked)
    return tmp_path / "w"


def train():
    run_tracked(load_params(), Path("data"), Path("models"), Path("reports/timing.json"))


def run_folder():
    (folder,) = (path for path in Path("checkpoints").iterdir() if path.is_dir() and not path.suffix)
    return folder


def bits():
    """Hashes of all that must be equal: model, journal, and the last checkpoint's weights, optimiser and RNG."""
    last = sorted(run_folder().glob("step-*"))[-1]
    paths = [Path("models/model/model.safetensors"), Path("models/steps.jsonl"), *sorted(last.glob("*.safetensors"))]
    return {f"{path.parent.name}/{path.name}": sha256_file(path) for path in paths}


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """What the run comes to when nothing happens to it."""
    folder = tmp_path_factory.mktemp("straight") / "w"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tracked_run, "Recorder", Untracked)
        train()
        return bits()


def start():
    """The stage in a process of its own, without MLflow."""
    program = (
        "import sys\nfrom pipeline import tracked_run\nfrom tests.test_tracked_run import Untracked, train\n"
        "from pipeline.stage import run_stage\ntracked_run.Recorder = Untracked\nrun_stage(train)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, n, deadline_s=120):
    """Return once the journal has `n` rows, or the process is gone."""
    end = time.monotonic() + deadline_s
    while process.poll() is None and time.monotonic() < end:
        if sum(path.read_text().count("\n") for path in Path("checkpoints").glob("*/times.jsonl")) >= n:
            return
        time.sleep(0.005)


def kill_in_a_save(process, deadline_s=120):
    """Kill it as soon as a checkpoint is being written; whether one was left unfinished."""
    end = time.monotonic() + deadline_s
    while process.poll() is None and time.monotonic() < end:
        if list(Path("checkpoints").glob("*/.unfinished-step-*")):
            break
    process.kill()
    process.wait()
    return bool(list(Path("checkpoints").glob("*/.unfinished-step-*")))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(workspace, straight):  # A1
    print("seed", seed := random.randrange(10**6))  # shown on failure
    chance = random.Random(seed)
    change(workspace, **{"record.checkpoint_steps": 2})  # often, so that all kills fall within the run's 60 steps
    codes, in_saves = [], 0
    for n in range(5, STEPS, 7):  # 8 times
        process = start()
        wait_for_steps(process, n)
        if n % 2:
            in_saves += kill_in_a_save(process)
        else:
            time.sleep(chance.uniform(0, 0.02))  # into a step, most of the time
            process.kill()
        codes.append(process.wait())
        assert codes[-1] in (-signal.SIGKILL, 0), process.stderr.read()  # 0: done before the kill came
        process.stderr.close()
    assert codes.count(-signal.SIGKILL) >= 6
    assert in_saves >= 1
    process = start()
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    assert bits() == straight


@pytest.mark.parametrize("save_every", [1, 1000])
def test_how_often_it_saves_decides_no_bit(workspace, straight, save_every):
    change(workspace, **{"record.checkpoint_steps": save_every, "record.sample_steps": 9})
    train()
    assert bits() == straight


class Killed(BaseException):
    pass


@pytest.fixture
def interrupted(workspace, monkeypatch):
    """The run, killed after step 30: its last checkpoint is that of step 28."""
    append = tracked_run.Journal.append

    def dying(journal, row, times):
        append(journal, row, times)
        if row["step"] == 30:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tracked_run.Journal, "append", dying)
        with pytest.raises(Killed):
            train()
    assert checkpoint_steps(run_folder())[0] == 28
    return workspace


def test_after_a_kill_it_goes_on_with_the_same_bits(interrupted, straight, capsys):
    train()
    assert "going on after step 28" in capsys.readouterr().out
    assert bits() == straight
    assert json.loads(Path("reports/timing.json").read_text())["resumes"] == 1


def no_optimiser(tensors, facts):
    return {**tensors, "optimizer": {}}, facts


def one_step_off(tensors, facts):
    return tensors, {**facts, "step": facts["step"] - 1}


def no_rng(tensors, facts):
    return {**tensors, "rng": {"cpu-0": torch.Generator().manual_seed(5).get_state()}}, facts


@pytest.mark.parametrize("mutant", [no_optimiser, one_step_off, no_rng])
def test_a_restore_that_forgets_something_is_found_out(interrupted, straight, monkeypatch, mutant):  # A2
    restore = tracked_run.TrainState.restore
    monkeypatch.setattr(tracked_run.TrainState, "restore", lambda state, *saved: restore(state, *mutant(*saved)))
    with pytest.raises(IntegrityError, match="came out as"):  # the replay of steps 29 and 30 differs from the journal
        train()
    saved = 27 if mutant is one_step_off else 28
    for path in run_folder().glob("*.jsonl"):  # and where the journal has nothing to compare with
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:saved]))
    if mutant is one_step_off:  # a journal that ends before the checkpoint is not gone on from
        with pytest.raises(IntegrityError, match="has 27 rows, the checkpoint is of step 28"):
            train()
        return
    train()
    assert bits() != straight


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_so(workspace, straight, number, code):  # A8
    process = start()
    wait_for_steps(process, 10)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == code
    assert said.strip().splitlines()[-1].startswith(f"error: {signal.Signals(number).name} at step")
    assert "Traceback" not in said
    rows = len(read_steps(run_folder() / "steps.jsonl"))
    assert checkpoint_steps(run_folder())[0] == rows < STEPS  # not a step is lost
    train()
    assert bits() == straight


def at_step(monkeypatch, step, act):
    """Have `act` called once the journal has the row of `step`."""
    append = tracked_run.Journal.append

    def acting(journal, row, times):
        append(journal, row, times)
        if row["step"] == step:
            act()

    monkeypatch.setattr(tracked_run.Journal, "append", acting)


def test_a_second_interrupt_during_the_save_stops_at_once(workspace, straight, monkeypatch, interruptible):  # A9
    save_file = checkpoint._save_file

    def interrupted(tensors, path):
        save_file(tensors, path)
        if "step-00000030" in str(path):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "SAME_S", 0.0)  # what comes later is a second one
        at_step(patch, 30, lambda: os.kill(os.getpid(), signal.SIGINT))  # the first
        patch.setattr(checkpoint, "_save_file", interrupted)
        assert exit_code_of(train) == 130
    assert checkpoint_steps(run_folder()) == [28, 21]
    assert not list(run_folder().glob(".*"))
    train()
    assert bits() == straight


def test_a_run_on_a_full_disk_ends_with_5_and_goes_on_once_there_is_room(
    workspace, straight, monkeypatch, capsys
):  # A6
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = 50_000  # bytes: room for the journal, not for the weights
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, before[1])))
            assert exit_code_of(train) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(
        r"error: disk full in \S+: [\d,]+ bytes needed, [\d,]+ bytes free, .+\n", capsys.readouterr().err
    )
    assert checkpoint_steps(run_folder()) == [7]
    assert not list(run_folder().glob(".*"))
    train()
    assert bits() == straight


def test_a_second_trainer_is_told_who_holds_the_run(interrupted):  # A11
    before = {path: path.stat().st_mtime_ns for path in run_folder().rglob("*")}
    with locked(run_folder().with_suffix(".lock")):
        process = start()
        said = process.communicate()[1]
    assert process.returncode == 6
    assert f"is held by process {os.getpid()}: wait for it or stop it" in said
    assert {path: path.stat().st_mtime_ns for path in run_folder().rglob("*")} == before
    with locked(run_folder().with_suffix(".lock")), pytest.raises(RunLocked):
        train()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(workspace, monkeypatch):  # A12
    forward = tracked_run.TrainState.__post_init__

    def poisoned(state):
        forward(state)
        calls = iter(range(10**6))
        loss = state.model.loss
        state.model.loss = lambda *batch: loss(*batch) * (float("nan") if next(calls) == 39 else 1)

    monkeypatch.setattr(tracked_run.TrainState, "__post_init__", poisoned)
    with pytest.raises(DivergedError, match=r"loss is nan at step 40, lr 0\.00\d+"):
        train()
    assert checkpoint_steps(run_folder())[0] == 35
    assert load_checkpoint(run_folder(), 35)[1]["step"] == 35


@pytest.mark.parametrize(("key", "value"), [("optim.lr", 0.001), ("train.seed", 2), ("target.loss", 0.2)])
def test_changed_parameters_are_another_run_and_named(interrupted, capsys, key, value):  # A13
    change(interrupted, **{key: value})
    train()
    said = capsys.readouterr().out
    assert "going on" not in said
    assert f"a new run, not the last one's ({run_folder_of_step(28)}): {key}" in said


def run_folder_of_step(step):
    """The folder whose newest checkpoint is that of `step`."""
    return next(f.name for f in Path("checkpoints").iterdir() if f.is_dir() and checkpoint_steps(f)[0] == step)


def test_changed_data_are_another_run_and_named(interrupted, capsys, tokenizer, shakespeare):  # A13
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.006)
    train()
    assert re.search(r"a new run, not the last one's .*: data_sha256 ", capsys.readouterr().out)


def test_another_number_of_threads_starts_anew_and_keeps_the_old(interrupted, capsys, monkeypatch):  # A13
    monkeypatch.setattr(tracked_run, "prepare_machine", lambda *given: MACHINE(*given)._replace(threads=77))
    old = sha256_json([sha256_file(path) for path in sorted(run_folder().glob("step-*/*"))])
    train()
    said = capsys.readouterr().out
    assert "starting anew: threads" in said
    assert "-> 77" in said
    kept = next(path for path in Path("checkpoints").iterdir() if path.suffix == ".1")
    assert sha256_json([sha256_file(path) for path in sorted(kept.glob("step-*/*"))]) == old


MACHINE = tracked_run.prepare_machine


def test_a_finished_run_takes_no_step_more(workspace, straight, capsys):  # A16
    train()
    before = bits()
    shutil.rmtree("models")  # as DVC does before it runs a stage
    train()
    assert "nothing to train" in capsys.readouterr().out
    assert bits() == before == straight


def test_the_model_of_the_best_look_is_kept_though_training_went_on(workspace, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5] + [5.0] * 100)
    monkeypatch.setattr(tracked_run, "corpus_loss", lambda *_, **__: next(losses))
    change(workspace, **{"target.look_steps": 11})
    train()
    assert json.loads(Path("models/run.json").read_text())["results"]["model_step"] == 22
    assert 22 in checkpoint_steps(run_folder())


@pytest.fixture
def held_out(workspace, tokenizer, shakespeare):
    """The run looks at a held-out text every five steps, and ends after three looks in vain."""
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.01, val_fraction=0.2)
    change(workspace, **{"target.rule": "validation", "target.look_steps": 5, "target.patience": 3})


def test_a_run_out_of_patience_ends_and_keeps_the_model_that_was_best_on_the_held_out_text(
    held_out, monkeypatch, capsys
):
    losses = iter([9.0, 8.0, 8.5, 7.0, 7.5, 7.0, 7.1, 6.0])  # 7.0 again is no lower loss

    def held_out_loss(model, text, *_, **__):
        return next(losses) if text.size < 1500 else 1.0

    monkeypatch.setattr(tracked_run, "corpus_loss", held_out_loss)
    train()
    results = json.loads(Path("models/run.json").read_text())["results"]
    assert (results["steps"], results["model_step"], results["corpus_loss"]) == (35, 20, 1.0)
    assert "the last 3 looks at the held-out text found no lower loss" in capsys.readouterr().out
    rows = read_steps(Path("models/steps.jsonl"))
    assert list(rows["validation_loss"].dropna().index) == [5, 10, 15, 20, 25, 30, 35]
    assert list(rows["corpus_loss"].dropna().index) == [5, 10, 20, 35]  # where the model may be kept, and at the end
    kept = load_checkpoint(run_folder(), 20)[0]["weights"]["wpe.weight"]
    assert torch.equal(load_model(Path("models/model")).wpe.weight, kept)


def die():
    raise Killed


def test_patience_survives_a_kill(held_out, monkeypatch):
    change(Path.cwd(), **{"optim.lr": 0.03})  # too high: the held-out loss soon rises
    train()
    straight, steps = bits(), len(read_steps(Path("models/steps.jsonl")))
    assert steps < STEPS
    shutil.rmtree("checkpoints")
    with monkeypatch.context() as patch:
        at_step(patch, steps - 4, die)  # between two looks in vain
        with pytest.raises(Killed):
            train()
    train()
    assert bits() == straight


@pytest.mark.parametrize(("key", "value"), [("target.rule", "validation"), ("target.patience", 2)])
def test_what_needs_a_held_out_text_is_refused_without_one(workspace, key, value):
    change(workspace, **{key: value})
    with pytest.raises(InputError, match=r"target\.\w+ is \w+, but nothing is held out: set corpus\.val_fraction"):
        train()
    assert not Path("checkpoints").exists()


def test_contradictions_between_sections_are_found_before_anything_is_opened(workspace):
    change(workspace, **{"windows.length": 65, "optim.warmup": 61})
    shutil.rmtree("data")
    with pytest.raises(InputError, match=r"warmup 61 .*take 61 steps, the run has \d+; windows.length 65 is longer"):
        train()
    assert not Path("checkpoints").exists()


def test_the_committed_params_are_a_run():
    assert RunConfig.of(load_params(ROOT / "params.yaml")).record.checkpoint_s > 0
