"""A run is resumed with the same bits after whatever happened to it, and only where it is the same run."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.data.encode import write_tokens
from pipeline.data.token_files import write_shard
from pipeline.model.weights import load_model
from pipeline.system.entrypoint import exit_code_of, run_stage  # noqa: F401 (for `start`)
from pipeline.system.errors import InputError, IntegrityError, RunLocked
from pipeline.system.files import locked, sha256_file, sha256_json, write_manifest
from pipeline.system.signals import StopSignals
from pipeline.tracking.journal import Journal, read_steps
from pipeline.tracking.mlflow_store import open_store
from pipeline.tracking.recorder import ending
from pipeline.training import checkpoint, consumers
from pipeline.training import train as tracked
from pipeline.training.checkpoint import checkpoint_steps, load_checkpoint
from pipeline.training.config import RunConfig
from pipeline.training.loop import TrainState
from pipeline.training.optim import OPTIMIZERS, Optimiser
from pipeline.training.target import RULES, Rule
from pipeline.training.train import run_tracked
from tests.trainings import Untracked, change
from tests.unit.training.test_checkpoint import at_nth_call
from tests.waiting import wait_until

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
STEPS = 24  # of 256 tokens; the target is out of reach, so that every run takes them all


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bpe, tokenizer, shakespeare):
    """A workspace of the smoke recipe, shortened, with its tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    change(
        folder,
        **{"optim.max_tokens": 256 * STEPS, "checkpoint.interval_steps": 3, "model.dropout": 0.1, "train.threads": 1},
    )
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    write_tokens(shakespeare, tokenizer, folder / "data" / "tokens", fraction=0.005)
    return folder


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setattr(tracked, "Recorder", Untracked)
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
        patch.setattr(tracked, "Recorder", Untracked)
        train()
        return bits()


def start(setting="pass"):
    """The stage in a process of its own, without MLflow, after what `setting` does there."""
    program = f"from tests.integration.test_run import *\ntracked.Recorder = Untracked\n{setting}\nrun_stage(train)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process):
    """Wait for a process that ends by itself; return its code and what it said on stderr."""
    said = process.communicate(timeout=300)[1]
    return process.returncode, said


def n_rows():
    """Records in the journal of the one run there is, or is to be."""
    return sum(path.read_text().count("\n") for path in Path("checkpoints").glob("*/times.jsonl"))


def hold_after(step):
    """Have the process wait there for its end."""
    at_step(pytest.MonkeyPatch(), step, sys.stdin.read)


def die_in_the_save_of(step, at_call):
    """Have SIGKILL end the process at the `at_call`-th call that touches the disk in the save of `step`, or later."""
    save = consumers.save_checkpoint

    def deadly(folder, saved, *state):
        if saved == step:
            at_nth_call(at_call, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return save(folder, saved, *state)

    consumers.save_checkpoint = deadly


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(workspace, straight, chance):  # A1
    change(workspace, **{"checkpoint.interval_steps": 2})  # often, so that each kill finds new ones
    unfinished = 0
    for n in range(4, 22, 5):  # 8 times: in a step or between two, and in the save of the step after
        with start(f"hold_after({n + 3})") as process:
            assert wait_until(lambda: n_rows() >= n or process.poll() is not None, 120)  # noqa: B023 (used at once)
            time.sleep(chance.uniform(0, 0.02))  # a moment that nobody chose, which need not be any one in particular
            process.kill()
        assert process.returncode == -signal.SIGKILL
        in_save = checkpoint_steps(run_folder())[0] + 2
        code, said = end(start(f"die_in_the_save_of({in_save}, {chance.randint(4, 20)})"))
        assert code == -signal.SIGKILL, said
        unfinished += len(list(Path("checkpoints").glob("*/.unfinished-step-*")))
    assert unfinished == 4, "kills in a save leave what the next start sweeps"
    code, said = end(start())
    assert code == 0, said
    assert bits() == straight


@pytest.mark.parametrize("save_every", [1, 1000])
def test_how_often_it_saves_decides_no_bit(workspace, straight, save_every):
    change(workspace, **{"checkpoint.interval_steps": save_every, "samples.interval_steps": 9})
    train()
    assert bits() == straight


class Killed(BaseException):
    pass


@pytest.fixture
def interrupted(workspace, monkeypatch):
    """The run, killed after step 11: its last checkpoint is that of step 9."""
    append = Journal.append

    def dying(journal, record):
        append(journal, record)
        if record.step == 11:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(Killed):
            train()
    assert checkpoint_steps(run_folder())[0] == 9
    return workspace


def test_after_a_kill_it_is_resumed_with_the_same_bits(interrupted, straight, capsys):
    train()
    assert "resumes from step 9 of 24" in capsys.readouterr().out
    assert bits() == straight
    assert json.loads(Path("reports/timing.json").read_text())["resumes"] == 1


def no_optimiser(tensors, scalars):
    return {**tensors, "optimizer": {}}, scalars


def one_step_off(tensors, scalars):
    return tensors, {**scalars, "step": scalars["step"] - 1}


def no_rng(tensors, scalars):
    return {**tensors, "rng": {"cpu-0": torch.Generator().manual_seed(5).get_state()}}, scalars


@pytest.mark.parametrize("mutant", [no_optimiser, one_step_off, no_rng])
def test_a_restore_that_forgets_something_is_found_out(interrupted, straight, monkeypatch, mutant):  # A2
    restore = TrainState.restore
    monkeypatch.setattr(TrainState, "restore", lambda state, *saved: restore(state, *mutant(*saved)))
    with pytest.raises(IntegrityError, match="came out as"):  # the replay of steps 10 and 11 differs from the journal
        train()
    saved = 8 if mutant is one_step_off else 9
    for path in run_folder().glob("*.jsonl"):  # and where the journal has nothing to compare with
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:saved]))
    if mutant is one_step_off:  # a journal that ends before the checkpoint is not resumed from
        with pytest.raises(IntegrityError, match="has 8 records, the checkpoint is of step 9"):
            train()
        return
    train()
    assert bits() != straight


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_so(workspace, straight, number, code):  # A8
    process = start()
    assert wait_until(lambda: n_rows() >= 5 or process.poll() is not None, 120)
    process.send_signal(number)
    found, said = end(process)
    assert found == code
    assert said.strip().splitlines()[-1].startswith(f"error: {signal.Signals(number).name} at step")
    assert "Traceback" not in said
    rows = len(read_steps(run_folder() / "steps.jsonl"))
    assert checkpoint_steps(run_folder())[0] == rows < STEPS  # not a step is lost
    train()
    assert bits() == straight


def at_step(monkeypatch, step, act):
    """Have `act` called once the journal has the row of `step`."""
    append = Journal.append

    def acting(journal, record):
        append(journal, record)
        if record.step == step:
            act()

    monkeypatch.setattr(Journal, "append", acting)


def test_a_second_interrupt_during_the_save_stops_at_once(workspace, straight, monkeypatch, interruptible):  # A9
    save_file = checkpoint.save_tensors

    def interrupted(tensors, path):
        save_file(tensors, path)
        if "step-00000011" in str(path):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "SAME_S", 0.0)  # what comes later is a second one
        at_step(patch, 11, lambda: os.kill(os.getpid(), signal.SIGINT))  # the first
        patch.setattr(checkpoint, "save_tensors", interrupted)
        assert exit_code_of(train) == 130
    assert checkpoint_steps(run_folder()) == [9, 6]
    assert not list(run_folder().glob(".*"))
    train()
    assert bits() == straight


def test_a_run_on_a_full_disk_ends_with_5_and_is_resumed_once_there_is_room(
    workspace, straight, monkeypatch, capsys
):  # A6
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = 50_000  # bytes: room for the journal, not for the weights
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, before[1])))
            assert exit_code_of(train) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(
        r"error: disk full in \S+: [\d,]+ bytes needed, [\d,]+ bytes free, .+\n", capsys.readouterr().err
    )
    assert checkpoint_steps(run_folder()) == [3]
    assert not list(run_folder().glob(".*"))
    train()
    assert bits() == straight


def turn_back_the_clock():
    """Let each call for the time of day find it an hour earlier; what measures durations is left alone."""
    hours, now, now_ns = count(), time.time, time.time_ns
    time.time = lambda: now() - 3600 * next(hours)
    time.time_ns = lambda: now_ns() - 3600 * 10**9 * next(hours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "utf8"),
    [("a project with späces, 文字 and 🎭", {}), ("no UTF-8 at all", {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})],
)
def test_locale_clock_and_path_decide_no_bit_and_mlflow_gets_every_row(
    prepared, straight, tmp_path, monkeypatch, name, utf8
):  # A15
    shutil.copytree(prepared, folder := tmp_path / name)
    change(folder, **{"samples.prompts": ["Brünnhilde:"]})  # which samples repeat
    with (folder / "params.yaml").open("a", encoding="utf-8") as params:
        params.write("# Grüße\n")
    monkeypatch.chdir(folder)
    program = "from tests.integration.test_run import *\nturn_back_the_clock()\nrun_stage(train)"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**kept, "LC_ALL": "C", "TZ": "Pacific/Apia", "PYTHONPATH": python_path, **utf8}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert bits() == straight
    records = Journal(run_folder()).records
    stamps = [record.logged_ms for record in records]
    assert stamps == sorted(stamps, reverse=True), "the control: the clock went back in each step"
    for key in ("train_s", "wall_s"):
        assert all(0 <= getattr(a, key) < getattr(b, key) for a, b in pairwise(records))
    assert json.loads(Path("reports/timing.json").read_text())["tokens_per_s"] > 0
    store = open_store(folder)
    (run,) = store.client.search_runs([store.experiment_id])
    run_id = run.info.run_id  # a slow machine gets the last rows when training is over
    assert wait_until(lambda: store.client.get_run(run_id).info.status == "FINISHED", 240)
    for key in ("loss", "tokens_per_s"):
        rows = store.client.get_metric_history(run_id, key)
        assert [(row.step, row.timestamp) for row in sorted(rows, key=lambda row: row.step)] == list(
            zip(range(1, STEPS + 1), stamps, strict=True)
        )
        assert all(row.value > 0 for row in rows)


@pytest.fixture
def namespaces():
    """Skips where a process may not mount a file system of its own."""
    tried = subprocess.run(["unshare", "-Urm", "true"], capture_output=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip("no user namespaces here: RLIMIT_FSIZE stands for the full disk")


def on_a_small_disk(left_bytes):
    """In a mount namespace: train on a disk that is too small, on one that fills up in the middle, and once more."""
    tracked.Recorder = Untracked
    disk = Path("checkpoints")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)  # a checkpoint has 1.3 MB
    codes = [exit_code_of(train)]
    assert not n_rows()
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)

    def fill():
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left_bytes)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, fill)
        codes.append(exit_code_of(train))
    left = [path.name for path in run_folder().iterdir() if path.name.startswith((".", "step-"))]
    (disk / "filler").unlink()
    codes.append(exit_code_of(train))
    print(json.dumps([codes, left, bits()]))


@pytest.mark.slow
@pytest.mark.parametrize("left_bytes", [0, 100_000])  # none for the journal's next row; some, but not for the weights
def test_a_real_small_disk_is_refused_and_a_full_one_costs_nothing(
    workspace, straight, namespaces, left_bytes
):  # A6, A7
    program = f"from tests.integration.test_run import *\non_a_small_disk({left_bytes})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(["unshare", "-Urm", sys.executable, "-c", program], env=environment, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, left, found = json.loads(done.stdout.splitlines()[-1])
    assert codes == [5, 5, 0]
    assert left == ["step-00000003"]  # intact, and nothing half written beside it
    assert found == straight
    early, late = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(r"may need [\d,]+ bytes of disk in \S+checkpoints\S*, [\d,]+ bytes are free: make room", early)
    needed = r"1,2\d\d,\d\d\d bytes needed, [\d,]+ bytes free" if left_bytes else "(.+ needed, )?0 bytes free"
    assert re.search(rf"disk full in \S+: {needed}, make room", late)
    assert "Traceback" not in done.stderr


def test_a_disk_known_to_be_too_small_is_refused_before_the_first_step(workspace, straight, monkeypatch, capsys):  # A7
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
        assert exit_code_of(train) == 5
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: the run may need [\d,]+ bytes of disk in .+, 1,000,000 bytes are free: .+\n", said)
        assert not n_rows()
        assert not list(Path("checkpoints").rglob("step-*"))
        assert not Path("models").exists()
        at_step(patch, 11, die)
        patch.setattr(shutil, "disk_usage", lambda place: usage)
        with pytest.raises(Killed):
            train()
        patch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
        assert exit_code_of(train) == 5  # what is held is not enough
        assert n_rows() == 11
    train()
    assert bits() == straight
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    train()  # a finished run saves no checkpoint any more


def test_a_batch_too_large_for_memory_is_refused_before_anything_is_made(workspace, capsys):  # A14
    change(workspace, **{"windows.micro_batch_size": 10**8, "optim.max_tokens": 10**12, "optim.warmup": 0.0})
    assert exit_code_of(train) == 5
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: windows\.micro_batch_size 100000000 of windows\.seq_len 64 needs [\d,.]+ GB of memory, "
        r"[\d,.]+ GB are free: make windows\.micro_batch_size smaller .+\n", said)  # fmt: skip
    assert not Path("checkpoints").exists()


def test_a_text_shorter_than_a_window_is_refused_with_what_it_has_and_needs(workspace, tokenizer, capsys):  # B3
    (workspace / "short.txt").write_text("Speak, speak.\n" * 3)
    shutil.rmtree("data/tokens")
    write_tokens(workspace / "short.txt", tokenizer, Path("data/tokens"))
    assert exit_code_of(train) == 2
    assert re.fullmatch(r"error: data/tokens/train has 18 tokens, needs 65: .+\n", capsys.readouterr().err)
    assert not Path("checkpoints").exists()


def test_a_second_trainer_is_told_who_holds_the_run(interrupted):  # A11
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*")}

    with locked(run_folder().with_suffix(".lock")):
        before = state()
        code, said = end(start())
        assert state() == before  # of the whole workspace
    assert code == 6
    assert f"{run_folder().name} is held by process {os.getpid()}: wait for it or stop it" in said
    with locked(run_folder().with_suffix(".lock")), pytest.raises(RunLocked):
        train()


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(
    workspace, monkeypatch, capsys, poison
):  # A12
    ends = []
    monkeypatch.setattr(Untracked, "__exit__", lambda self, kind, error, trace: ends.append(ending(error)["status"]))
    forward = TrainState.__post_init__

    def poisoned(state):
        forward(state)
        calls = iter(range(10**6))
        loss = state.model.loss
        state.model.loss = lambda *batch: loss(*batch) * (float(poison) if next(calls) == 15 else 1)

    monkeypatch.setattr(TrainState, "__post_init__", poisoned)
    assert exit_code_of(train) == 4
    assert re.fullmatch(rf"error: loss is {poison} at step 16, lr 0\.00\d+.*\n", capsys.readouterr().err)
    assert checkpoint_steps(run_folder())[0] == 15
    assert load_checkpoint(run_folder(), 15)[1]["step"] == 15
    assert len(read_steps(run_folder() / "steps.jsonl")) == 15  # what did not happen has no row
    assert ends == ["FAILED"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 0.001),
        ("train.seed", 2),
        ("target.loss", 0.2),
        ("model.vocab_size", 50304),
        ("model.fold_vocab", False),
    ],
)
def test_changed_parameters_are_another_run_and_named(interrupted, capsys, key, value):  # A13
    change(interrupted, **{key: value})
    train()
    said = capsys.readouterr().out
    assert "resumes from" not in said
    assert f"a new run, not the last one's ({run_folder_of_step(9)}): {key}" in said


def run_folder_of_step(step):
    """The folder whose newest checkpoint is that of `step`."""
    return next(f.name for f in Path("checkpoints").iterdir() if f.is_dir() and checkpoint_steps(f)[0] == step)


def test_changed_data_are_another_run_and_named(interrupted, capsys, tokenizer, shakespeare):  # A13
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.006)
    train()
    said = capsys.readouterr().out
    assert re.search(r"a new run, not the last one's .*: data_sha256 ", said)
    assert "resumes from" not in said


def test_other_threads_start_from_step_0_and_keep_the_old_checkpoints(interrupted, capsys, monkeypatch):  # A13
    monkeypatch.setattr(tracked, "prepare_machine", lambda *given: MACHINE(*given)._replace(threads=77))
    old = sha256_json([sha256_file(path) for path in sorted(run_folder().glob("step-*/*"))])
    train()
    said = capsys.readouterr().out
    assert "environment changed (threads" in said
    assert "-> 77): starting from step 0. Old checkpoints are in" in said
    kept = next(path for path in Path("checkpoints").iterdir() if path.suffix == ".1")
    assert sha256_json([sha256_file(path) for path in sorted(kept.glob("step-*/*"))]) == old


MACHINE = tracked.prepare_machine


def test_a_finished_run_takes_no_step_more(workspace, straight, capsys):  # A16
    train()
    before = bits()
    shutil.rmtree("models")  # as DVC does before it runs a stage
    train()
    assert "nothing to train" in capsys.readouterr().out
    assert bits() == before == straight


def test_the_model_of_the_best_step_is_kept_though_training_went_on(workspace, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5] + [5.0] * 100)
    monkeypatch.setattr(consumers, "corpus_loss", lambda *_, **__: next(losses))
    change(workspace, **{"target.eval_interval": 4})
    train()
    assert json.loads(Path("models/run.json").read_text())["results"]["model_step"] == 8
    assert 8 in checkpoint_steps(run_folder())


@pytest.fixture
def held_out(workspace, tokenizer, shakespeare):
    """A held-out text is evaluated every second step; three evaluations without a lower loss end the run."""
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.01, val_fraction=0.2)
    change(workspace, **{"target.rule": "validation", "target.eval_interval": 2, "target.early_stopping_patience": 3})


def test_a_run_out_of_patience_ends_and_keeps_the_model_that_was_best_on_the_held_out_text(
    held_out, monkeypatch, capsys
):
    losses = iter([9.0, 8.0, 8.5, 7.0, 7.5, 7.0, 7.1, 6.0])  # 7.0 again is no lower loss

    def held_out_loss(model, text, *_, **__):
        return next(losses) if text.size < 1500 else 1.0

    monkeypatch.setattr(consumers, "corpus_loss", held_out_loss)
    train()
    results = json.loads(Path("models/run.json").read_text())["results"]
    assert (results["steps"], results["model_step"], results["corpus_loss"]) == (14, 8, 1.0)
    assert "the last 3 evaluations found no lower validation loss" in capsys.readouterr().out
    rows = read_steps(Path("models/steps.jsonl"))
    assert list(rows["validation_loss"].dropna().index) == [2, 4, 6, 8, 10, 12, 14]
    assert list(rows["corpus_loss"].dropna().index) == [2, 4, 8, 14]  # where the model may be kept, and at the end
    kept = load_checkpoint(run_folder(), 8)[0]["weights"]["wpe.weight"]
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
        at_step(patch, steps - 1, die)  # between two evaluations without a lower loss
        with pytest.raises(Killed):
            train()
    train()
    assert bits() == straight


@pytest.mark.parametrize(("key", "value"), [("target.rule", "validation"), ("target.early_stopping_patience", 2)])
def test_what_needs_a_held_out_text_is_refused_without_one(workspace, key, value):
    change(workspace, **{key: value})
    with pytest.raises(InputError, match=r"target\.\w+ is \w+, but nothing is held out: set corpus\.val_fraction"):
        train()
    assert not Path("checkpoints").exists()


def test_contradictions_between_sections_are_found_before_anything_is_opened(workspace):
    change(workspace, **{"windows.seq_len": 65, "optim.warmup": 61})
    shutil.rmtree("data")
    with pytest.raises(InputError, match=r"warmup 61 .*take 61 steps, the run has \d+; windows.seq_len 65 is longer"):
        train()
    assert not Path("checkpoints").exists()


class Toy(torch.optim.SGD):
    """An optimiser from outside, whose state is of two slots."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p] = self.state[p] or {"step": torch.zeros(()), "mean": torch.zeros_like(p)}
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 / float(state["step"]))
                p.data.add_(state["mean"], alpha=-group["lr"])


def test_an_optimiser_that_is_added_to_the_table_is_resumed_with_the_same_bits(workspace, monkeypatch):
    entry = Optimiser(lambda model, config, precision: [Toy(model.parameters(), config.lr)], (("step", "mean"),))
    monkeypatch.setitem(OPTIMIZERS, "toy", entry)
    change(workspace, **{"optim.name": "toy"})
    train()
    straight = bits()
    shutil.rmtree("checkpoints")
    with monkeypatch.context() as patch:
        at_step(patch, 11, die)
        with pytest.raises(Killed):
            train()
    train()
    assert bits() == straight


def test_a_rule_that_is_added_to_the_table_ends_the_run(workspace, monkeypatch):
    rule = Rule(lambda records, config: records[-1].step == 5, description="the fifth step")
    monkeypatch.setitem(RULES, "fifth", rule)
    change(workspace, **{"target.rule": "fifth"})
    train()
    results = json.loads(Path("models/run.json").read_text())["results"]
    assert (results["steps"], results["rule"], results["to_target"]["fifth"]["steps"]) == (5, "fifth", 5)


def test_the_committed_params_are_a_run():
    assert RunConfig.of(load_params(ROOT / "params.yaml")).checkpoint.interval_s > 0


def test_tokens_with_more_ids_than_the_model_has_are_refused(workspace):  # B4
    shutil.rmtree("data/tokens")
    Path("data/tokens").mkdir()
    for part in ("train", "val"):
        write_shard(Path(f"data/tokens/{part}-00000.bin"), [[50300] * 1000], vocab_size=60000)
    write_manifest(Path("data/tokens"))
    with pytest.raises(InputError, match=r"has 60000 ids, model\.vocab_size is 50257: make model\.vocab_size larger"):
        train()
    assert not Path("checkpoints").exists()
