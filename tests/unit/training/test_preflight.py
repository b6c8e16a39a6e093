"""What is foretold of memory and disk against what a step keeps and a run saves, and the refusals."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig
from pipeline.data.batches import Split, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.weights import save_model
from pipeline.system.device import Machine
from pipeline.system.errors import OutOfSpaceError
from pipeline.training import preflight as memory
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.preflight import check_disk, check_fits, saved_bytes, step_bytes

ROOT = Path(__file__).parents[3]
SHAPE = ModelConfig(n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=50257, dropout=0.0, fold_vocab=True)
VOCABULARY = Vocabulary.of(np.arange(50257) < 500, 50257)
MACHINE = Machine(torch.device("cpu"), "fp32", 1)


def settings(batch=4, kind="adamw", gradient_checkpointing=False):
    whole = RunConfig.of(load_params())
    config = replace(
        whole,
        model=SHAPE,
        windows=whole.windows.updated(seq_len=32, micro_batch_size=batch),
        optim=whole.optim.updated(name=kind),
        train=whole.train.updated(gradient_checkpointing=gradient_checkpointing),
    )
    return config, VOCABULARY, MACHINE


def test_what_is_foretold_is_what_a_real_forward_pass_keeps(monkeypatch):
    model, ids = GPT(SHAPE, VOCABULARY).initialise(1), torch.zeros(4, 32, dtype=torch.int64)
    storages = {}
    with saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        loss = model.loss(ids, ids, 128)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in own)
    assert loss.requires_grad
    weights = sum(p.numel() * 4 for p in model.parameters())
    logits = 10 * 4 * 32 * VOCABULARY.n_rows
    monkeypatch.setattr(memory, "BATCH_TOKENS", 1)
    assert step_bytes(*settings()) == pytest.approx(4 * weights + kept + logits, rel=0.01)


# two steps and an evaluation of BATCH_TOKENS tokens, after as much of a toy, which brings in what the libraries take
IN_A_PROCESS = """
import resource
from dataclasses import replace
import numpy as np, psutil, torch
from pipeline.config.params import load_params
from pipeline.model.evaluate import BATCH_TOKENS
from pipeline.system.device import prepare_machine
from pipeline.training.preflight import step_bytes
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps
from pipeline.data.vocab import Vocabulary
from pipeline.data.batches import Batch

def go(config, vocabulary, length, batch):
    state = fresh_state(config.model, vocabulary, config.optim, config.train, machine)
    ids = torch.randint(vocabulary.n_rows, (batch, length))
    steps = iter(lambda: [Batch(ids, ids, ids.numel())], None)
    for _ in train_steps(state, steps, 2, config.optim, machine):
        pass
    with torch.inference_mode(), machine.autocast():
        state.model.eval().token_losses(*2 * [torch.zeros(BATCH_TOKENS // 128, length, dtype=torch.int64)])

config = RunConfig.of(load_params())
machine = prepare_machine(config.train)
toy = replace(config, model=config.model.updated(n_layer=1, n_head=1, n_embd=16))
go(toy, Vocabulary.of(np.arange(50257) < 50, 50257), 8, 2)
before, vocabulary = psutil.Process().memory_info().rss, Vocabulary.of(np.arange(50257) < 11706, 50257)
go(config, vocabulary, config.windows.seq_len, config.windows.micro_batch_size)
print(step_bytes(config, vocabulary, machine), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_what_is_foretold_is_near_what_a_process_takes():
    """On a CPU freed memory is kept, so that a process takes more than is live at a time (benchmarks/LOG.md)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", IN_A_PROCESS], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300, check=True).stdout  # fmt: skip
    foretold, taken = map(int, said.split())
    assert 0.6 < foretold / taken < 1.15


def test_memory_grows_with_the_batch_and_shrinks_with_recomputing_and_with_muon():
    plain = step_bytes(*settings(batch=64))
    assert step_bytes(*settings(batch=128)) > 1.5 * plain
    assert step_bytes(*settings(batch=64, gradient_checkpointing=True)) < plain
    assert step_bytes(*settings(batch=64, kind="muon")) < plain


def test_an_evaluation_counts_beside_a_step_on_a_cpu_which_keeps_what_is_freed():
    config, _, machine = settings(batch=1)
    folded, full = (step_bytes(config, v, machine) for v in (VOCABULARY, Vocabulary.full(50257)))
    evaluation, weights, step = (n * (50257 - VOCABULARY.n_rows) for n in (8 * 8192, 5 * 4 * 64, 10 * 32))
    assert full - folded == evaluation + weights + step


def test_a_batch_that_does_not_fit_is_refused_with_the_bytes_it_needs(monkeypatch):  # A14
    with pytest.raises(
        OutOfSpaceError, match=r"windows\.micro_batch_size 1000000000 of windows\.seq_len 32 needs [\d,.]+ GB"
    ) as error:
        check_fits(*settings(batch=10**9))
    assert "windows.gradient_accumulation_steps" in str(error.value)
    assert error.value.exit_code == 5
    monkeypatch.setattr(memory, "free_bytes", lambda machine: step_bytes(*settings()))
    check_fits(*settings())


# The disk


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_and_a_model_take_as_much_disk_as_is_foretold_and_never_more(tmp_path, bpe, kind):  # A7
    config, *_ = settings(kind=kind)
    text = Split(Tokens("text", [np.arange(200, dtype=np.uint16)], 50257), VOCABULARY, MACHINE.device)
    state = fresh_state(config.model, VOCABULARY, config.optim, config.train, MACHINE)
    next(train_steps(state, steps_of(1, text, config.windows, 1), 1, config.optim, MACHINE))
    checkpoint = bytes_in(save_checkpoint(tmp_path, 1, state.tensors(), state.scalars()))
    save_model(tmp_path / "model", state.model, bpe)
    foretold, model = saved_bytes(config, VOCABULARY)
    assert checkpoint <= foretold < 1.03 * checkpoint  # a larger model comes nearer: its headers are as small
    assert bytes_in(tmp_path / "model") <= model < 1.01 * bytes_in(tmp_path / "model")


def test_each_process_has_random_numbers_of_its_own_to_save():
    config, *_ = settings()
    alone, four = (saved_bytes(config, VOCABULARY, processes)[0] for processes in (1, 4))
    assert four - alone >= 3 * torch.get_rng_state().numel()


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A folder of checkpoints to be, and room on its disk, which a test may change."""
    folder = Namespace(path=tmp_path / "checkpoints" / "run", room=0)
    folder.checkpoint, _ = saved_bytes(settings()[0], VOCABULARY)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda place: Namespace(free=folder.room))
    return folder


def require_exactly(needed, checkpoints):
    """Fail unless so many bytes of room are just enough for a run."""
    checkpoints.room = needed
    check_disk(*settings(), checkpoints.path)
    checkpoints.room = needed - 1
    place = checkpoints.path.parents[1]
    said = f"the run may need {needed:,} bytes of disk in {place}.*, {needed - 1:,} bytes are free: make room there"
    with pytest.raises(OutOfSpaceError, match=said) as error:
        check_disk(*settings(), checkpoints.path)
    assert error.value.exit_code == 5


def test_a_disk_needs_room_for_four_checkpoints(checkpoints):  # A7
    require_exactly(4 * checkpoints.checkpoint, checkpoints)


def test_what_the_run_holds_already_needs_no_room_again(checkpoints):  # A7
    held = 0
    for name in (
        "step-00000007",
        "step-00000014",
        ".unfinished-step-00000021",
    ):  # the last is removed at the resume
        (checkpoints.path / name).mkdir(parents=True)
        with (checkpoints.path / name / "weights.safetensors").open("wb") as file:
            held += file.truncate(checkpoints.checkpoint - 5)
    require_exactly(4 * checkpoints.checkpoint - held, checkpoints)
    (checkpoints.path / "step-00000021").mkdir()
    (checkpoints.path / "step-00000021" / "weights.safetensors").open("wb").truncate(checkpoints.checkpoint + 15)
    checkpoints.room = 0
    check_disk(*settings(), checkpoints.path)
