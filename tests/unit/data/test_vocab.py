"""Folding is exact: full-vocabulary training, with one row in place of all that never occur."""

import copy

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.training.loop import finish_gradients

SIZE, USED = 50257, np.array([3, 5, 50, 500, 50256])
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=SIZE, dropout=0.0, fold_vocab=True)


def counts():
    found = np.zeros(SIZE, dtype=np.int64)
    found[USED] = 7
    return found


def folded_and_full():
    """The same model twice in float64: folded, and with all rows, the unused ones equal."""
    vocabulary = Vocabulary.of(counts(), SIZE)
    folded = GPT(CONFIG, vocabulary).initialise(seed=1).double()
    full = GPT(CONFIG, Vocabulary.full(SIZE)).double()
    weights = copy.deepcopy(folded.state_dict())
    weights["wte.weight"] = vocabulary.unfold_rows(weights["wte.weight"])
    full.load_state_dict(weights)
    return folded, full


def expanded(folded):
    return folded.vocabulary.unfold_rows(folded.wte.weight)


@pytest.fixture
def ids():
    return torch.from_numpy(np.random.default_rng(1).choice(USED, (2, 9)))


@pytest.mark.parametrize("clip", [None, 0.05])  # the norm is about 2, so that 0.05 clips hard
def test_folded_training_equals_full_vocabulary_training_in_float64(ids, clip):
    models = folded_and_full()
    optimizers = [AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in models]
    for _ in range(20):
        losses, norms = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            rows = model.vocabulary.fold(ids)
            optimizer.zero_grad()
            loss = double_loss(model, rows)
            loss.backward()
            norms.append(finish_gradients(model, clip).item())
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        assert norms[0] == pytest.approx(norms[1], rel=1e-11)
    folded, full = models
    assert losses[0] < 8  # it learns, from 10.8
    # AdamW divides by the root of the second moment, which magnifies the last bits a thousandfold
    assert (expanded(folded) - full.wte.weight).abs().max() < 1e-11
    for a, b in zip(folded.h.parameters(), full.h.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-11


def double_loss(model, rows):
    """The plain formula, whose softmax stays in float64."""
    logits = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def test_an_id_that_never_occurs_costs_what_it_costs_in_the_full_model():
    folded, full = (model.float() for model in folded_and_full())
    unseen = torch.tensor([[3, 7, 5, 9, 50]])  # 7 and 9 do not occur in the training text
    with torch.no_grad():
        losses = [
            m.token_losses(m.vocabulary.fold(unseen)[:, :-1], m.vocabulary.fold(unseen)[:, 1:]) for m in (folded, full)
        ]
    assert torch.allclose(*losses, atol=1e-5)


def test_folding_and_unfolding_rows_loses_nothing():
    vocabulary = Vocabulary.of(counts(), SIZE)
    rows = torch.randn(vocabulary.n_rows, 4)
    assert vocabulary.n_rows == 6
    assert torch.equal(vocabulary.fold_rows(vocabulary.unfold_rows(rows)), rows)


def test_a_padded_vocabulary_folds_its_padding_too():
    vocabulary = Vocabulary.of(counts(), 50304)
    assert vocabulary.n_unused == 50304 - len(USED)
    assert vocabulary.unfold_rows(torch.zeros(6, 2)).shape == (50304, 2)


def test_a_text_with_all_ids_is_not_folded():
    vocabulary = Vocabulary.of(np.ones(SIZE, dtype=np.int64), SIZE)
    assert (vocabulary.n_unused, vocabulary.n_rows, vocabulary.unused_bias) == (0, SIZE, 0.0)
