"""Folding equals training with the full vocabulary, with one row for all ids that never occur."""

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.training.loop import finish_gradients

SIZE, USED = 2000, np.array([3, 5, 50, 500, 1999])
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=SIZE, dropout=0.0, fold_vocab=True)
COUNTS = np.bincount(np.repeat(USED, 7), minlength=SIZE)


def folded_and_full():
    """The same model twice in float64: folded, and with all rows, the unused ones equal."""
    vocabulary = Vocabulary.of(COUNTS, SIZE)
    folded = GPT(CONFIG, vocabulary).initialise(seed=1).double()
    full = GPT(CONFIG, Vocabulary.full(SIZE)).double()
    weights = folded.state_dict()
    full.load_state_dict(weights | {"wte.weight": vocabulary.unfold_rows(weights["wte.weight"])})
    return folded, full


@pytest.mark.parametrize("clip", [None, 0.05])  # the norm is about 2, so that 0.05 clips hard
def test_folded_training_equals_full_vocabulary_training_in_float64(clip):
    ids = torch.from_numpy(np.random.default_rng(1).choice(USED, (2, 9)))
    models = folded_and_full()
    optimizers = [AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in models]
    for _ in range(20):
        losses, norms = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            rows = model.vocabulary.fold(ids)
            optimizer.zero_grad()
            loss = float64_loss(model, rows)
            loss.backward()
            norms.append(finish_gradients(model, clip).item())
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        assert norms[0] == pytest.approx(norms[1], rel=1e-11)
    folded, full = models
    assert losses[0] < 5  # it learns, from 7.6
    # AdamW divides by the root of the second moment, which amplifies rounding errors a thousandfold
    assert (folded.vocabulary.unfold_rows(folded.wte.weight) - full.wte.weight).abs().max() < 1e-11
    for a, b in zip(folded.h.parameters(), full.h.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-11


def float64_loss(model, rows):
    """The plain formula, without the model's softmax in float32."""
    logits = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def test_an_unused_id_has_the_loss_of_the_full_model():
    ids = torch.tensor([[3, 7, 5, 9, 50]])  # 7 and 9 do not occur in the training text
    with torch.no_grad():
        rows_of = [(model.float(), model.vocabulary.fold(ids)) for model in folded_and_full()]
        losses = [model.token_losses(rows[:, :-1], rows[:, 1:]) for model, rows in rows_of]
    assert torch.allclose(*losses, atol=1e-5)


def test_rows_are_unfolded_and_folded_without_loss():
    vocabulary = Vocabulary.of(COUNTS, SIZE)
    rows = torch.randn(6, 4)
    assert vocabulary.n_rows == 6
    assert torch.equal(vocabulary.fold_rows(vocabulary.unfold_rows(rows)), rows)
    padded = Vocabulary.of(COUNTS, SIZE + 47)  # the padding of a vocabulary is folded too
    assert padded.n_unused == SIZE + 47 - len(USED)
    assert padded.unfold_rows(rows).shape == (SIZE + 47, 4)


def test_a_text_with_all_ids_but_one_is_not_folded():
    for n_unused in (0, 1):
        vocabulary = Vocabulary.of(np.arange(SIZE) >= n_unused, SIZE)
        assert (vocabulary.n_unused, vocabulary.n_rows, vocabulary.unused_bias) == (0, SIZE, 0.0)
