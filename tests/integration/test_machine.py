"""Training on the real machine: the memory that a process takes, and a compiled model."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.trainings import ROOT
from tests.unit.training.test_loop import Loop

# Two steps and an evaluation of BATCH_TOKENS tokens. The same with a toy model comes first, and what the libraries
# allocate once is not counted.
MEASURE = """
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_the_estimated_memory_is_close_to_what_a_process_takes():
    """On a CPU freed memory is not returned, so a process takes more than is live at one time (benchmarks/LOG.md)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300, check=True).stdout  # fmt: skip
    estimated, taken = map(int, said.split())
    assert 0.6 < estimated / taken < 1.15


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")
def test_a_compiled_model_takes_the_same_steps():
    plain, compiled = Loop(steps=3), Loop(steps=3, compile=True)
    for one, other in zip(plain, compiled, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    assert plain.state.tensors()["weights"].keys() == compiled.state.tensors()["weights"].keys()
