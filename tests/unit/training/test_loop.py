"""The loop: records out, weights changed, nothing else."""

import math
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig, OptimConfig, TrainConfig, WindowsConfig
from pipeline.data.batches import Split, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.system.device import prepare_machine
from pipeline.system.errors import DivergedError
from pipeline.tracking.journal import STEPS
from pipeline.training import loop as train
from pipeline.training.loop import fresh_state, train_steps

IDS = np.random.default_rng(1).integers(0, 32, 200).astype(np.uint16)  # 32 symbols
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=True)
VOCABULARY = Vocabulary(np.arange(32), 32)  # none unused
ROWS = Split(Tokens("text", [IDS], 32), VOCABULARY, torch.device("cpu"))


class Loop:
    """A tiny run: its state and its records."""

    def __init__(self, steps=20, batch=2, accumulate=1, precision="fp32", dropout=0.0, compile=False, **optim):
        params = load_params()
        self.windows = WindowsConfig(
            seq_len=8, micro_batch_size=batch, gradient_accumulation_steps=accumulate, order="shuffled"
        )
        self.optim = params.section(OptimConfig).updated(**{"lr": 0.01, "warmup": 0, **optim})
        where = params.section(TrainConfig).updated(precision=precision, device="cpu", compile=compile)
        self.machine, self.steps = prepare_machine(where), steps
        self.state = fresh_state(MODEL.updated(dropout=dropout), VOCABULARY, self.optim, where, self.machine)

    def __iter__(self):
        batches = steps_of(self.state.step + 1, ROWS, self.windows, seed=1)
        return train_steps(self.state, batches, self.steps, self.optim, self.machine)

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.state.model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_memorises_a_short_text():
    losses = [record.loss for record in Loop(steps=400, schedule="linear")]
    assert losses[0] == pytest.approx(math.log(32), abs=0.2)  # an untrained model knows nothing
    # 25 windows of random symbols: all is known but each window's second token, as far as first tokens are shared
    assert np.mean(losses[-13:]) < 0.35


def test_records_count_from_one_and_tokens_add_up():
    records = list(Loop(steps=13))  # one pass: 25 windows, the last of 7 targets
    assert [record.step for record in records] == list(range(1, 14))
    assert records[0].tokens == 16
    assert records[-1].tokens == 199 + 8  # the whole text and a window of the next pass


def test_the_lr_of_a_record_is_that_of_the_schedule():
    assert [r.lr for r in Loop(steps=4, schedule="linear")] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for _ in range(2):
        loop = Loop(dropout=0.1)  # seeds the global stream, which dropout draws from
        runs.append(([replace(record, step_s=0) for record in loop], loop.weights()))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])


def test_accumulation_equals_one_large_batch():
    together, apart = (Loop(steps=5, name="adamw", lr=1e-3, **shape) for shape in ({"batch": 4}, {"accumulate": 2}))
    for one, other in zip(together, apart, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.tokens == other.tokens


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_restored_state_is_resumed_with_the_same_bits(kind, dropout):
    straight = Loop(name=kind, dropout=dropout)
    records = list(straight)
    interrupted = Loop(name=kind, dropout=dropout)
    list(islice(interrupted, 7))
    saved = {stem: {k: v.clone() for k, v in group.items()} for stem, group in interrupted.state.tensors().items()}
    resumed = Loop(name=kind, dropout=dropout)
    resumed.state.restore(saved, interrupted.state.scalars())
    assert [r.line(STEPS) for r in resumed] == [r.line(STEPS) for r in records[7:]]
    assert equal(straight.weights(), resumed.weights())


@pytest.mark.fault
@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_what_is_not_finite_never_reaches_the_weights(where):  # A12
    loop = Loop()
    records = iter(loop)
    next(records)
    before = loop.weights()
    if where == "loss":
        hook = loop.state.model.ln_f.register_forward_hook(lambda *_: torch.full((2, 8, 32), math.nan))
    else:
        hook = loop.state.model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=rf"{where} is (nan|inf) at step 2, lr 0\.00"):
        next(records)
    hook.remove()
    assert equal(before, loop.weights())


def test_the_callers_time_is_not_training_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    for record in Loop(steps=3):
        next(clock)  # the caller's time passes
        assert record.step_s == 1.0


def test_the_caller_may_leave_the_model_in_eval_mode():
    loop = Loop(steps=2)
    for _ in loop:
        assert loop.state.model.training
        loop.state.model.eval()


def test_an_fp16_overflow_halves_the_scale_and_takes_the_step_again():
    loop = Loop(steps=1)
    loop.state.loss_scale = 2.0**16
    tries = []

    def overflow(gradient):
        tries.append(loop.state.loss_scale)
        return gradient * (math.inf if len(tries) < 3 else 1)

    loop.state.model.ln_f.weight.register_hook(overflow)
    (record,) = loop
    assert tries == [2.0**16, 2.0**15, 2.0**14]
    assert math.isfinite(record.grad_norm)


def test_the_loss_scale_changes_no_gradient():
    plain, scaled = Loop(), Loop()
    scaled.state.loss_scale = 2.0**10
    for one, other in zip(plain, scaled, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")
def test_a_compiled_model_takes_the_same_steps():
    plain, compiled = Loop(steps=3), Loop(steps=3, compile=True)
    for one, other in zip(plain, compiled, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    assert plain.state.tensors()["weights"].keys() == compiled.state.tensors()["weights"].keys()
