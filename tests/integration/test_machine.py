"""Training on the real machine: the memory that a process takes, and a compiled model."""

import resource
import shutil
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import setuptools  # noqa: F401 (torch.compile fails if another test has imported distutils before it)
import torch

from pipeline.config.params import load_params
from pipeline.data.batches import Batch
from pipeline.data.vocab import Vocabulary
from pipeline.model.evaluate import BATCH_TOKENS
from pipeline.system.device import prepare_machine
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.preflight import step_bytes
from tests.trainings import ROOT, end, output_of, start
from tests.unit.training.test_loop import Loop


def step_and_evaluate(config, machine, vocabulary, length, batch):
    state = fresh_state(config.model, vocabulary, config.optim, config.train, machine)
    ids = torch.randint(vocabulary.n_rows, (batch, length))
    batches = iter(lambda: [Batch(ids, ids, ids.numel())], None)
    for _ in train_steps(state, batches, 6, config.optim, machine):
        pass
    with torch.inference_mode(), machine.autocast():
        state.model.eval().token_losses(*2 * [torch.zeros(BATCH_TOKENS // length, length, dtype=torch.int64)])


def print_estimated_and_taken_bytes():
    config = RunConfig.of(load_params(ROOT / "params.yaml"))
    machine, windows = prepare_machine(config.train), config.windows
    toy = replace(config, model=config.model.updated(n_layer=1, n_head=1, n_embd=16))
    step_and_evaluate(toy, machine, Vocabulary.of(np.arange(50257) < 50, 50257), 8, 2)  # what libraries allocate once
    before, vocabulary = psutil.Process().memory_info().rss, Vocabulary.of(np.arange(50257) < 11706, 50257)
    step_and_evaluate(config, machine, vocabulary, windows.seq_len, windows.micro_batch_size)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(step_bytes(config, vocabulary, machine), largest - before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_the_estimated_memory_is_close_to_what_a_process_takes(tmp_path, monkeypatch):
    """On a CPU freed memory is not returned, so a process takes more than is live at one time (benchmarks/LOG.md)."""
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):  # what the allocator reuses varies by a tenth: a process may take the most of them
        process = start(print_estimated_and_taken_bytes, CUDA_VISIBLE_DEVICES="")
        assert end(process) == 0, output_of(process)
        found.append(tuple(map(int, output_of(process).split())))
    estimated, taken = found[0][0], max(taken for _, taken in found)
    assert 0.6 < estimated / taken < 1.15


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")
def test_a_compiled_model_takes_the_same_steps():
    plain, compiled = Loop(steps=3), Loop(steps=3, where={"compile": True})
    for one, other in zip(plain, compiled, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    assert plain.state.tensors()["weights"].keys() == compiled.state.tensors()["weights"].keys()
