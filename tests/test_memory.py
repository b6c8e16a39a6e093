"""The foretold memory of a step against what a step really keeps, and the refusal."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pipeline import memory
from pipeline.config import load_params
from pipeline.errors import OutOfSpaceError
from pipeline.machine import Machine
from pipeline.memory import check_fits, step_bytes
from pipeline.model import GPT, ModelConfig
from pipeline.run_config import RunConfig
from pipeline.vocab import Vocabulary

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=50257, dropout=0.0, fold_vocab=True)
VOCABULARY = Vocabulary.of(np.arange(50257) < 500, 50257)
MACHINE = Machine(torch.device("cpu"), "fp32", 1)


def settings(batch=4, kind="adamw", gradient_checkpointing=False):
    whole = RunConfig.of(load_params())
    config = replace(
        whole,
        model=SHAPE,
        windows=whole.windows.updated(length=32, batch=batch),
        optim=whole.optim.updated(kind=kind),
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


# two steps and a look at BATCH_TOKENS tokens, after as much of a toy, which brings in what the libraries take
IN_A_PROCESS = """
import resource
from dataclasses import replace
import numpy as np, psutil, torch
from pipeline.config import load_params
from pipeline.evaluate import BATCH_TOKENS
from pipeline.machine import prepare_machine
from pipeline.memory import step_bytes
from pipeline.run_config import RunConfig
from pipeline.train import fresh_state, train_steps
from pipeline.vocab import Vocabulary
from pipeline.windows import Batch

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
go(config, vocabulary, config.windows.length, config.windows.batch)
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


def test_a_look_at_the_whole_text_counts_beside_a_step_on_a_cpu_which_keeps_what_is_freed():
    config, _, machine = settings(batch=1)
    folded, full = (step_bytes(config, v, machine) for v in (VOCABULARY, Vocabulary.full(50257)))
    look, rows, step = (n * (50257 - VOCABULARY.n_rows) for n in (8 * 8192, 5 * 4 * 64, 10 * 32))
    assert full - folded == look + rows + step


def test_a_batch_that_does_not_fit_is_refused_with_the_bytes_it_needs(monkeypatch):  # A14
    with pytest.raises(
        OutOfSpaceError, match=r"windows\.batch 1000000000 of windows\.length 32 needs [\d,.]+ GB"
    ) as error:
        check_fits(*settings(batch=10**9))
    assert "windows.accumulate" in str(error.value)
    assert error.value.exit_code == 5
    monkeypatch.setattr(memory, "free_bytes", lambda machine: step_bytes(*settings()))
    check_fits(*settings())
