"""The training loop: the numbers of its records, its gradients, and a resumed state."""

import math

import numpy as np
import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig, OptimConfig, TrainConfig, WindowsConfig
from pipeline.data.batches import Split, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.system.device import prepare_machine
from pipeline.system.distributed import ALONE
from pipeline.system.errors import DivergedError
from pipeline.training import loop
from pipeline.training.loop import fresh_state, train_steps
from tests.trainings import ROOT

IDS = np.random.default_rng(1).integers(0, 32, 200).astype(np.uint16)  # of a vocabulary of 32
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=True)


def split(ids):
    all_occur = Vocabulary(np.arange(32), 32)
    return Split(Tokens("text", [ids], 32), all_occur, torch.device("cpu"))


TEXT = split(IDS)


class Loop:
    """A tiny run, which can be iterated."""

    def __init__(
        self, steps=20, batch=2, accumulate=1, text=TEXT, world=ALONE, shape=MODEL, seq_len=8, where=None, **optim
    ):
        params = load_params(ROOT / "params.yaml")
        self.windows = WindowsConfig(
            seq_len=seq_len, micro_batch_size=batch, gradient_accumulation_steps=accumulate, order="shuffled"
        )
        self.optim = params.section(OptimConfig).updated(**{"lr": 0.01, "warmup": 0, **optim})
        plain = {"seed": 1, "precision": "fp32", "device": "cpu", "threads": 1, "compile": False}
        self.train = params.section(TrainConfig).updated(**{**plain, **(where or {})})
        self.machine, self.steps, self.text = prepare_machine(self.train, world=world), steps, text
        self.state = fresh_state(shape, text.vocabulary, self.optim, self.train, self.machine)

    def __iter__(self):
        batches = steps_of(self.state.step + 1, self.text, self.windows, 1, self.machine.world)
        return train_steps(self.state, batches, self.steps, self.optim, self.machine)

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.state.model.parameters()])


def test_records_have_the_step_the_tokens_so_far_and_the_lr_of_the_schedule():
    records = list(Loop(steps=13, schedule="linear"))  # an epoch: 25 windows, the last of 7 targets
    assert [record.step for record in records] == list(range(1, 14))
    assert records[0].tokens == 16
    assert records[-1].tokens == 199 + 8  # an epoch and a window of the next one
    assert [record.lr for record in records] == pytest.approx([0.01 * (1 - i / 13) for i in range(13)])


def test_accumulation_equals_one_large_batch():
    together, apart = (Loop(steps=5, name="adamw", lr=1e-3, **shape) for shape in ({"batch": 4}, {"accumulate": 2}))
    for one, other in zip(together, apart, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.tokens == other.tokens


@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_never_reaches_the_weights(where):  # A12
    run = Loop()
    records = iter(run)
    next(records)
    before = run.weights()
    if where == "loss":
        hook = run.state.model.ln_f.register_forward_hook(lambda *_: torch.full((2, 8, 32), math.nan))
    else:
        hook = run.state.model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=rf"{where} is (nan|inf) at step 2, lr 0\.00"):
        next(records)
    hook.remove()
    assert torch.equal(before, run.weights())


def test_the_caller_may_evaluate_between_two_steps_and_its_time_is_not_training_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    run = Loop(steps=3)
    for record in run:
        assert run.state.model.training
        run.state.model.eval()
        next(clock)
        assert record.step_s == 1.0


def test_an_fp16_overflow_halves_the_scale_and_takes_the_step_again_and_no_scale_changes_a_gradient():
    plain, scaled = Loop(steps=3), Loop(steps=3)
    scaled.state.loss_scale = 2.0**16
    scales = []

    def overflow(gradient):
        scales.append(scaled.state.loss_scale)
        return gradient * (math.inf if len(scales) < 3 else 1)

    scaled.state.model.ln_f.weight.register_hook(overflow)
    for one, other in zip(plain, scaled, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert scales == [2.0**16, 2.0**15, *[2.0**14] * 3]


@pytest.mark.parametrize(("precision", "scale"), [("fp16", 2.0), ("fp32", 1.0)])
def test_the_loss_scale_of_fp16_grows_again_after_it_has_fallen_to_1(precision, scale):
    run = Loop()
    state = fresh_state(MODEL, TEXT.vocabulary, run.optim, run.train, run.machine._replace(precision=precision))
    state.loss_scale = 1.0
    for _ in range(2000):
        state.scale_after(finite=True)
    assert state.loss_scale == scale


def test_a_copy_of_a_sharded_model_takes_no_random_numbers():
    state = Loop().state
    state.sharded, before = True, torch.get_rng_state()
    copy = state.whole_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert copy is not state.model
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), state.model.parameters(), strict=True))
