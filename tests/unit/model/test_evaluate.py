"""What a model knows of a text, against the plain ways to find out."""

from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config.params import load_params
from pipeline.config.sections import EvaluateConfig, ModelConfig, OptimConfig, TrainConfig, WindowsConfig
from pipeline.data.batches import Split, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model.evaluate import corpus_loss, position_loss, recall_starts, top1_accuracy, verbatim_recall
from pipeline.model.gpt import GPT
from pipeline.system.device import prepare_machine
from pipeline.training.loop import fresh_state, train_steps

T = 16
IDS = torch.from_numpy(np.random.default_rng(1).integers(0, 32, 200))


def split_of(ids):
    return Split(
        Tokens("text", [ids.numpy().astype(np.uint16)], 32), Vocabulary(np.arange(32), 32), torch.device("cpu")
    )


SPLIT = split_of(IDS)
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=50257, dropout=0.0, fold_vocab=True)


@pytest.fixture(scope="module")
def model():
    """A model that knows much of SPLIT, not all."""
    params = load_params()
    where = params.section(TrainConfig).updated(device="cpu", precision="fp32")
    optim = params.section(OptimConfig).updated(lr=0.01, warmup=0)
    windows = WindowsConfig(seq_len=T, micro_batch_size=4, gradient_accumulation_steps=1, order="shuffled")
    machine = prepare_machine(where)
    state = fresh_state(SHAPE, Vocabulary(np.arange(32), 32), optim, where, machine)
    list(islice(train_steps(state, steps_of(1, SPLIT, windows, seed=1), 150, optim, machine), 150))
    return state.model.eval()


def test_the_corpus_loss_is_the_mean_over_every_token_but_the_first(model):
    losses = []
    for begin in range(0, 199, T):  # window by window, the last one short
        window = IDS[begin : begin + T + 1]
        with torch.no_grad():
            losses += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none").tolist()
    assert len(losses) == 199
    assert corpus_loss(model, SPLIT, T, nullcontext()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_shift_moves_the_windows(model):
    shifted = corpus_loss(model, SPLIT, T, nullcontext(), shift=T // 2)
    assert shifted == pytest.approx(corpus_loss(model, split_of(IDS[T // 2 :]), T, nullcontext()))
    assert shifted > 2 * corpus_loss(model, SPLIT, T, nullcontext())  # fixed windows memorise one alignment


def test_the_losses_by_position_have_the_corpus_loss_as_their_mean(model):
    by_position = position_loss(model, SPLIT, T, nullcontext())
    counts = [13] * 7 + [12] * 9  # 12 windows of 16 targets and one of 7
    assert np.average(by_position, weights=counts) == pytest.approx(
        corpus_loss(model, SPLIT, T, nullcontext()), rel=1e-6
    )


def test_accuracy_counts_likeliest_tokens(model):
    with torch.no_grad():
        hits = sum(
            (model(IDS[None, i : min(i + T, 199)])[0].argmax(1) == IDS[i + 1 : i + T + 1]).sum().item()
            for i in range(0, 199, T)
        )
    assert top1_accuracy(model, SPLIT, T, nullcontext()) == pytest.approx(hits / 199)


def recited(model, given):
    """`given` and eight ids after it, the likeliest each time."""
    for _ in range(8):
        given = torch.cat([given, model(given[None])[0, -1].argmax()[None]])
    return given


def test_recall_is_what_greedy_decoding_recites(model):
    starts = list(range(0, 180, 7))
    exact = [torch.equal(recited(model, IDS[s : s + 8]), IDS[s : s + 16]) for s in starts]
    assert 0 < sum(exact) < len(starts)  # some, not all: the comparison can fail
    assert verbatim_recall(model, SPLIT, starts, nullcontext()) == np.mean(exact)


def test_recall_starts_have_room_and_are_aligned_when_asked(model):
    config = EvaluateConfig(recall_places=200, seed=1)
    anywhere, aligned = (recall_starts(200, model, config, flag) for flag in (False, True))
    assert anywhere == list(range(185))  # all places with room for 8 + 8 tokens
    assert aligned == list(range(0, 185, T))


def test_every_figure_takes_the_model_as_it_is_in_eval_mode():
    noisy = GPT(SHAPE.updated(dropout=0.5), Vocabulary(np.arange(32), 32)).initialise(seed=1).eval()
    assert corpus_loss(noisy, SPLIT, T, nullcontext()) == corpus_loss(noisy, SPLIT, T, nullcontext())
