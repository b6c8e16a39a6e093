"""Generation: seeded, greedy at 0, within the trained length, and never an id that is not text."""

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.generate import continue_rows, generate
from pipeline.model import GPT, ModelConfig
from pipeline.vocab import Vocabulary

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=50304, dropout=0.0, fold_vocab=True)


@pytest.fixture
def model():
    return GPT(SHAPE, Vocabulary.full(50304)).initialise(seed=1).eval()


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    texts = [generate(model, tokenizer, "ROMEO:", 10, 1.0, 50, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("ROMEO:")


def test_temperature_zero_takes_the_likeliest(model):
    rows = torch.tensor([[1, 2, 3]])
    greedy = continue_rows(model, rows, 1, 0.0, 0, 0)[0, -1]
    with torch.no_grad():
        assert greedy == model(rows)[0, -1, :50257].argmax()
    assert greedy == continue_rows(model, rows, 1, 1.0, 1, 5)[0, -1]  # as does top_k 1


def test_only_the_trained_length_is_looked_at(model):
    model.trained_length = 4
    long, short = torch.arange(20)[None], torch.arange(16, 20)[None]
    a, b = (continue_rows(model, rows, 5, 0.0, 0, 0)[0, -5:] for rows in (long, short))
    assert torch.equal(a, b)


@pytest.mark.security
def test_a_padded_id_is_never_drawn(model):  # E4
    with torch.no_grad():
        model.ln_f.bias.fill_(1)
        model.wte.weight[50257:] = 100.0  # the padded ids would win by far
    assert (continue_rows(model, torch.tensor([[1]]), 20, 1.0, 0, 1) < 50257).all()


@pytest.mark.security
def test_the_representative_of_the_unused_ids_is_never_drawn():
    vocabulary = Vocabulary(np.arange(5), 50304)
    folded = GPT(SHAPE, vocabulary).initialise(seed=1).eval()  # its last row has nearly all the probability
    assert (continue_rows(folded, torch.tensor([[1]]), 50, 1.0, 0, 1) < 5).all()


def test_an_empty_prompt_has_a_beginning(model, tokenizer):
    assert isinstance(generate(model, tokenizer, "", 3, 0.0, 0, 0), str)


@pytest.mark.parametrize(
    "bad", [{"max_tokens": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}]
)
def test_numbers_out_of_range_are_refused(model, tokenizer, bad):
    settings = {"max_tokens": 1, "temperature": 1.0, "top_k": 0, "seed": 0, **bad}
    with pytest.raises(InputError, match="0 or more"):
        generate(model, tokenizer, "x", **settings)


def test_training_goes_on_in_training_mode_after_a_sample(model, tokenizer):
    model.train()
    generate(model, tokenizer, "x", 1, 0.0, 0, 0)
    assert model.training
