"""A run ends with the same bits after any interruption, and is resumed only if it is the same run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import count, pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pipeline.data.encode import write_tokens
from pipeline.data.token_files import write_shard
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.evaluate import TextLoss
from pipeline.model.weights import load_model
from pipeline.system.entrypoint import exit_code_of, run_stage  # noqa: F401 (for processes)
from pipeline.system.errors import IntegrityError
from pipeline.system.files import locked, read_json, write_manifest
from pipeline.system.signals import StopSignals
from pipeline.tracking import fingerprint
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.journal import Journal, read_steps
from pipeline.tracking.mlflow_store import open_store
from pipeline.tracking.recorder import ending
from pipeline.training import checkpoint, consumers, loop
from pipeline.training import train as training
from pipeline.training.checkpoint import checkpoint_steps, load_checkpoint
from pipeline.training.loop import TrainState
from pipeline.training.optim import OPTIMIZERS, Optimiser
from pipeline.training.run import REPEATED, Run
from tests.trainings import (
    ROOT,
    STEPS,
    Killed,
    Untracked,
    at_step,
    bits,
    change,
    epochs,
    n_steps,
    run_folder,
    train,
    train_until_killed,
)
from tests.waiting import wait_until


@pytest.fixture
def interrupted(workspace):
    """A workspace whose run was killed after step 8; its last checkpoint is that of step 6."""
    train_until_killed(8)
    assert checkpoint_steps(run_folder()) == [6, 3]
    return workspace


def test_how_often_it_saves_and_samples_changes_no_bit(workspace, straight):
    change(workspace, **{"checkpoint.interval_steps": 1, "samples.interval_steps": 5})
    train()
    assert bits() == bits(straight)
    assert len(list((run_folder() / "samples").iterdir())) == 3  # after steps 5, 10 and 12


def test_after_a_kill_it_is_resumed_with_the_same_bits(interrupted, straight, capsys):
    train()
    assert "resumes from step 6 of 12" in capsys.readouterr().out
    assert bits() == bits(straight)
    assert json.loads(Path("reports/timing.json").read_text())["resumes"] == 1


def no_optimiser(tensors, scalars):
    return {**tensors, "optimizer": {}}, scalars


def one_step_off(tensors, scalars):
    return tensors, {**scalars, "step": scalars["step"] - 1}


def no_rng(tensors, scalars):
    return {**tensors, "rng": {"cpu-0": torch.Generator().manual_seed(5).get_state()}}, scalars


@pytest.mark.parametrize("mutant", [no_optimiser, one_step_off, no_rng])
def test_an_incomplete_restore_is_detected(interrupted, monkeypatch, mutant):  # A2
    restore = TrainState.restore
    monkeypatch.setattr(TrainState, "restore", lambda state, *saved: restore(state, *mutant(*saved)))
    with pytest.raises(IntegrityError, match="after the resume"):  # steps 7 and 8 are repeated and differ
        train()


@pytest.mark.parametrize(("killed_after", "inexact"), [(2, []), (8, [f"{REPEATED} after step 6"])])
def test_steps_that_were_lost_are_trained_again_without_a_comparison_where_no_repetition_is_exact(
    workspace, monkeypatch, killed_after, inexact
):
    prepare, gradients, calls = training.prepare_machine, loop._gradients, count()
    monkeypatch.setattr(training, "prepare_machine", lambda *arguments: prepare(*arguments)._replace(exact=False))
    monkeypatch.setattr(loop, "_gradients", lambda *a: tuple(x * (1 + 1e-7 * next(calls)) for x in gradients(*a)))
    train_until_killed(killed_after)
    lost = read_steps(run_folder() / "steps.jsonl")
    (run_folder() / "mlflow_run_id").write_text("1")  # the run with the lost steps
    train()
    steps = read_steps(Path("models/steps.jsonl"))
    assert steps.index.tolist() == list(range(1, STEPS + 1))
    assert steps.loss[killed_after] != lost.loss[killed_after]
    assert read_json(Path("models/run.json"))["inexact"] == inexact
    assert not (run_folder() / "mlflow_run_id").exists()


def test_a_journal_with_fewer_records_than_the_checkpoint_has_steps_is_refused(interrupted):
    for path in run_folder().glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(IntegrityError, match="has 5 records, the checkpoint is of step 6"):
        train()


def test_a_signal_ends_the_step_saves_and_prints_one_line(workspace, straight, capsys, interruptible):  # A8
    for step, number in ((4, signal.SIGTERM), (5, signal.SIGINT), (10, signal.SIGHUP)):
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, step, lambda number=number: os.kill(os.getpid(), number))
            assert exit_code_of(train) == 128 + number
        assert capsys.readouterr().err.startswith(f"error: {number.name} at step {step} of 12, all saved in ")
        assert checkpoint_steps(run_folder())[0] == n_steps() == step
    train()
    assert bits() == bits(straight)


def test_a_second_interrupt_during_the_save_stops_at_once(workspace, straight, monkeypatch, interruptible):  # A9
    save_file = checkpoint.save_tensors

    def interrupt_in_save(tensors, path):
        save_file(tensors, path)
        if "step-00000008" in str(path):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "SAME_S", 0.0)  # seconds within which two signals count as one
        at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))  # the first
        patch.setattr(checkpoint, "save_tensors", interrupt_in_save)
        assert exit_code_of(train) == 130
    assert checkpoint_steps(run_folder()) == [6, 3]
    assert not list(run_folder().glob(".*"))
    train()
    assert bits() == bits(straight)


def too_large_a_batch(workspace):
    change(workspace, **{"windows.micro_batch_size": 10**8, "optim.max_epochs": 10**9, "optim.warmup": 0.0})


def too_short_a_text(workspace):
    text = Path("short.txt")
    text.write_text("Speak, speak.\n" * 3)
    shutil.rmtree("data/tokens")
    write_tokens(text, load_tokenizer(Path("data/tokenizer")), Path("data/tokens"))


def too_short_a_budget(workspace):
    change(workspace, **{"optim.max_epochs": 0.1})


def too_many_ids(workspace):
    shutil.rmtree("data/tokens")
    Path("data/tokens").mkdir()
    for part in ("train", "val"):
        write_shard(Path(f"data/tokens/{part}-00000.bin"), [[50300] * 1000], vocab_size=60000)
    write_manifest(Path("data/tokens"))


def no_held_out_text(workspace):
    change(workspace, **{"target.rule": "validation"})


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        (too_large_a_batch, 5, r"windows\.micro_batch_size 100000000 of windows\.seq_len 64 needs [\d,.]+ GB of "
         r"memory, [\d,.]+ GB are free: make windows\.micro_batch_size smaller .+"),  # A14
        (too_short_a_text, 2, r"data/tokens/train has 18 tokens, needs 65: .+"),  # B3
        (too_short_a_budget, 2, r"optim\.max_epochs 0\.1 of 1,568 tokens is less than one step of 256 tokens"),
        (too_many_ids, 2, r".* has 60000 ids, the model 50257: run `dvc repro -f tokenize`"),  # B4
        (no_held_out_text, 2, r"target\.rule is validation, but the held-out text has 0 tokens, needs 2: .+"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_work_is_refused_in_one_line_before_anything_is_made(
    workspace, capsys, setting, code, message
):
    setting(workspace)
    assert exit_code_of(train) == code
    assert re.fullmatch(rf"error: {message}\n", capsys.readouterr().err)
    assert not Path("checkpoints").exists()


def test_a_second_trainer_names_the_process_that_holds_the_run(interrupted, capsys):  # A11
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*")}

    with locked(run_folder().with_suffix(".lock")):
        before = state()
        assert exit_code_of(train) == 6
        assert state() == before  # of the whole workspace
    said = capsys.readouterr().err
    assert f"{run_folder().name} is held by process {os.getpid()}: wait for it or stop it" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(workspace, monkeypatch, capsys):  # A12
    ends = []
    monkeypatch.setattr(Untracked, "__exit__", lambda self, kind, error, trace: ends.append(ending(error)["status"]))
    initialise = TrainState.__post_init__

    def poisoned(state):
        initialise(state)
        calls = count()
        loss = state.model.loss
        state.model.loss = lambda *batch: loss(*batch) * (float("nan") if next(calls) == 7 else 1)

    monkeypatch.setattr(TrainState, "__post_init__", poisoned)
    assert exit_code_of(train) == 4
    assert re.fullmatch(r"error: loss is nan at step 8, lr 0\.00\d+.*\n", capsys.readouterr().err)
    assert checkpoint_steps(run_folder())[0] == load_checkpoint(run_folder(), 6)[1]["step"] == 6
    assert len(read_steps(run_folder() / "steps.jsonl")) == 7  # step 8 has no record
    assert ends == ["FAILED"]


def test_a_loss_over_the_text_that_is_not_finite_stops_the_run_too(workspace, monkeypatch, capsys):  # A12
    change(workspace, **{"target.eval_interval": 4})
    losses = iter([7.0, float("nan")])
    monkeypatch.setattr(consumers, "text_loss", lambda *_: TextLoss(next(losses), complete=True))
    assert exit_code_of(train) == 4
    assert re.fullmatch(r"error: sliding_loss is nan after step 8, lr 0\.00\d+.*\n", capsys.readouterr().err)
    assert len(read_steps(run_folder() / "steps.jsonl")) == 7


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes the machine look like another one, or like itself again; the computed bits are the same."""
    environment = fingerprint._environment

    def move(threads=7):
        monkeypatch.setattr(fingerprint, "_environment", lambda machine: environment(machine) | {"threads": threads})

    return move


def test_a_run_returns_to_the_checkpoint_of_its_environment(interrupted, straight, elsewhere, capsys):
    elsewhere()
    train_until_killed(4)
    said = capsys.readouterr().out
    assert "environment changed (threads 1 -> 7): starting from step 0. Old checkpoints are in" in said
    assert f"{run_folder().name}.1; --elastic resumes anyway" in said
    elsewhere(threads=1)
    train()
    said = capsys.readouterr().out
    assert f"the run {run_folder().name}.1 took the same 6 steps: its checkpoint is copied" in said
    assert "starting from step 0" not in said
    assert bits() == bits(straight)


def test_elastic_resumes_the_older_checkpoint_also_after_a_start_from_step_0(interrupted, elsewhere, capsys):
    elsewhere()
    train_until_killed(4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # before it has resumed
        patch.setattr(Run, "_resume_inexactly", Mock(side_effect=Killed))
        train(elastic=True)
    assert checkpoint_steps(run_folder()) == [6]
    assert checkpoint_steps(run_folder().with_suffix(".2")) == [3]
    capsys.readouterr()
    train(elastic=True)
    said = capsys.readouterr().out
    assert "resumes from step 6 of 12" in said
    assert read_json(Path("models/run.json"))["inexact"] == ["threads 1 -> 7 after step 6"]


def test_a_damaged_file_of_another_run_is_no_reason_to_stop(interrupted, capsys):
    (run_folder() / IDENTITY).write_text("{")
    change(interrupted, **{"optim.lr": 0.001})
    train_until_killed(1)
    assert "starts from step 0 of 12" in capsys.readouterr().out


def test_a_change_of_parameters_or_data_begins_another_run_and_is_named(
    interrupted, capsys, tokenizer, shakespeare
):  # A13
    last = run_folder().name
    change(interrupted, **{"optim.lr": 0.001})
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.006)
    train_until_killed(1)
    said = capsys.readouterr().out
    assert re.search(
        rf"a new run, which differs from the last one \({last}\): .*data_sha256 .*optim\.lr 0\.01 -> 0\.001", said
    )
    assert "resumes from" not in said


def test_a_finished_run_takes_no_more_steps_and_needs_no_disk(workspace, straight, monkeypatch, capsys):  # A16
    shutil.copytree(straight / "checkpoints", "checkpoints")
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=0))
    train()
    assert "no step is left to train" in capsys.readouterr().out
    assert bits() == bits(straight)


CONSTANT = {"optim.schedule": "constant", "optim.warmup": 2}
SHARE = CONSTANT | {"optim.warmup": 0.25}
WSD = CONSTANT | {"optim.schedule": "wsd", "optim.decay": 0.25}
LINEAR = {"optim.schedule": "linear"}


@pytest.mark.parametrize(("short", "longer", "step", "end", "start"), [
    (CONSTANT, {}, 8, "resumes from step 8\n", "took the same 8 steps"),
    # the best step so far is 6, though the end of the short run was better
    (CONSTANT | {"target.eval_interval": 3, "checkpoint.interval_steps": 1}, WSD, 8, "step 8\n", "the same 8 steps"),
    (WSD, {}, 7, "resumes from step 7\n", "took the same 7 steps"),  # step 8 had a lower rate
    # steps 6 and 8, in the decay, were better than step 4, the best before it
    (WSD | {"optim.decay": 0.5, "target.eval_interval": 2}, {}, 5, "resumes from step 5\n", "took the same 5 steps"),
    (WSD, LINEAR, 0, "resumes from step 7\n", "up to 3, and has no checkpoint of them: optim.schedule linear"),
    (SHARE, {}, 0, "from step 8 if optim.warmup is 2,", "set optim.warmup to its 2 "),
    (SHARE, CONSTANT, 8, "from step 8 if", "took the same 8 steps"),
    (LINEAR, {}, 0, "is a new run from step 0: optim.schedule linear", "starting from step 0: the run"),
    (CONSTANT, {"optim.lr": 0.003}, 0, "resumes from step 8\n", "optim.lr 0.01 -> 0.003"),
])  # fmt: skip
def test_a_larger_budget_resumes_after_equal_steps_with_the_bits_of_a_run_that_had_it_from_the_start(
    workspace, capsys, short, longer, step, end, start
):
    change(workspace, **{**epochs(workspace, 8), "checkpoint.interval_steps": 100, **short})
    train()
    assert end in capsys.readouterr().out
    earlier = run_folder()
    change(workspace, **epochs(workspace, 12) | longer)
    train_until_killed(10)
    assert start in (said := capsys.readouterr().out)
    assert (f"resumes from step {step} of 12" in said) == bool(step)
    if step:
        train()
        earlier.rename(workspace / "earlier")
        extended = bits()
        shutil.rmtree("checkpoints")
        train()
        assert extended == bits()


@pytest.fixture
def held_out(workspace, tokenizer, shakespeare):
    """A workspace with a held-out text, which the target rule uses."""
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.01, val_fraction=0.2)
    change(workspace, **epochs(workspace, STEPS), **{"target.rule": "validation", "target.eval_interval": 1})
    return workspace


def test_a_run_out_of_patience_ends_also_after_a_kill_and_keeps_the_model_with_the_best_validation_loss(
    held_out, monkeypatch, capsys
):
    change(held_out, **{"target.early_stopping_patience": 3})
    validation = [9.0, 8.0, 8.5, 7.0, 7.5, 7.0, 7.1, 6.0]  # by step; a second 7.0 is not lower
    evaluate, step = consumers.evaluate, 0

    def evaluate_step(run, record):
        nonlocal step
        step = record.step
        evaluate(run, record)

    monkeypatch.setattr(training, "evaluate", evaluate_step)
    monkeypatch.setattr(
        consumers, "text_loss", lambda _, text, *__: TextLoss(validation[step - 1] if text.size < 1500 else 1.0, True)
    )
    train_until_killed(7)  # two evaluations of three are over at the last checkpoint, that of step 6
    train()
    results = json.loads(Path("models/run.json").read_text())["results"]
    assert (results["steps"], results["model_step"], results["loss"]) == (7, 4, 7.0)
    lines = capsys.readouterr().out.splitlines()
    assert "the last 3 evaluations found no lower validation loss: early stopping saves 5 of 12 steps" in lines
    assert "the model of step 4 is kept: its validation_loss is 7.0000, 7.1000 at the last step" in lines
    steps = read_steps(Path("models/steps.jsonl"))
    assert list(steps["validation_loss"]) == validation[:7]
    assert list(steps["corpus_loss"].dropna().index) == [7]  # at the end
    kept = load_checkpoint(run_folder(), 4)[0]["weights"]["wpe.weight"]
    assert torch.equal(load_model(Path("models/model")).wpe.weight, kept)


class Toy(torch.optim.SGD):
    """An optimiser that the project does not have, with two entries of state for each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p] = self.state[p] or {"step": torch.zeros(()), "mean": torch.zeros_like(p)}
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 / float(state["step"]))
                p.data.add_(state["mean"], alpha=-group["lr"])


def test_an_optimiser_that_is_added_to_the_table_is_resumed_with_the_same_bits(held_out, monkeypatch):
    entry = Optimiser(lambda model, config, precision: [Toy(model.parameters(), config.lr)], (("step", "mean"),))
    monkeypatch.setitem(OPTIMIZERS, "toy", entry)
    change(held_out, **{"optim.name": "toy", "target.eval_interval": 4})
    train()
    expected, losses = bits(), read_steps(Path("models/steps.jsonl"))["validation_loss"].dropna()
    assert list(losses.index) == [4, 8, 12]
    assert losses.between(1, 12).all()
    shutil.rmtree("checkpoints")
    train_until_killed(8)
    train()
    assert bits() == expected


def turn_back_the_clock():
    """Set the time of day back by an hour at each call. Clocks that measure durations are not changed."""
    hours, now, now_ns = count(), time.time, time.time_ns
    time.time = lambda: now() - 3600 * next(hours)
    time.time_ns = lambda: now_ns() - 3600 * 10**9 * next(hours)


def train_without_the_compiler():
    """Train, and check that torch's compiler, whose import takes two seconds, was not imported."""
    train()
    assert sys.modules.keys().isdisjoint(["torch._dynamo", "sympy"])


def test_locale_and_clock_change_no_bit_and_no_record_in_mlflow(prepared, straight, tmp_path, monkeypatch):  # A15
    shutil.copytree(prepared, folder := tmp_path / "no UTF-8 at all")
    change(folder, **{"samples.prompts": ["Brünnhilde:"]})
    with (folder / "params.yaml").open("a", encoding="utf-8") as params:
        params.write("# Grüße\n")
    monkeypatch.chdir(folder)
    program = "from tests.integration.test_run import *\nturn_back_the_clock()\nrun_stage(train_without_the_compiler)"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    environment = {**kept, "LC_ALL": "C", "TZ": "Pacific/Apia", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert bits() == bits(straight)
    records = Journal(run_folder()).records
    stamps = [record.logged_ms for record in records]
    assert stamps == sorted(stamps, reverse=True), "the clock was set back in each step"
    for key in ("train_s", "wall_s"):
        assert all(0 <= getattr(a, key) < getattr(b, key) for a, b in pairwise(records))
    assert json.loads(Path("reports/timing.json").read_text())["tokens_per_s"] > 0
    store = open_store(folder)
    (run,) = store.client.search_runs([store.experiment_id])
    run_id = run.info.run_id  # the recorder may still send records when training has ended
    assert wait_until(lambda: store.client.get_run(run_id).info.status == "FINISHED", 240)
    for key in ("loss", "tokens_per_s"):
        points = sorted(store.client.get_metric_history(run_id, key), key=lambda point: point.step)
        assert [(point.step, point.timestamp) for point in points] == list(enumerate(stamps, start=1))
        assert all(point.value > 0 for point in points)
