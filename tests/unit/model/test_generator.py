"""Generation: the same as reading everything again for each token, with a KV cache, drafts and batches."""

import numpy as np
import pytest
import torch

from pipeline.config.sections import ModelConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.data.vocab import Vocabulary
from pipeline.model.decoder import KVCache
from pipeline.model.generator import Generator, context_start
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling, sample
from pipeline.system.errors import InputError

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50304, dropout=0.0, fold_vocab=True)
PROMPTS = ["ROMEO:", "", "First Citizen:\nBefore we proceed any further, hear me speak, and then some more", "O"]
SETTINGS = [
    {"temperature": 0},
    {"temperature": 1, "seed": 3},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 2**63 - 1},
]


@pytest.fixture(scope="module")
def model():
    return lively(GPT(SHAPE, Vocabulary.full(50304)))


def lively(model):
    """Far from its beginning, so that it writes more than one word."""
    model.initialise(seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return Generator(model, tokenizer)


def written(generator, prompts, sampling):
    """Ids that each prompt was continued by."""
    ids = [[] for _ in prompts]
    for piece in generator.stream(prompts, sampling):
        ids[piece.sequence] += piece.ids
    return ids


def uncached(model, tokenizer, prompt, sampling):
    """The plain way: all of the context through the model for each token."""
    rows = tokenizer.encode(prompt) or [tokenizer.eot]
    n_prompt, source = len(rows), torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([rows[context_start(len(rows), model.trained_length) :]]))[0, -1]
        logits[50257:] = -torch.inf
        if (row := sample(logits, sampling, rows, source)) == tokenizer.eot:
            break
        rows.append(row)
    return rows[n_prompt:]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_writes_what_reading_all_anew_for_each_token_writes(prompt, settings, model, generator, tokenizer):
    sampling = Sampling(max_tokens=40, **settings)  # three times what the model can see
    assert written(generator, [prompt], sampling)[0] == uncached(model, tokenizer, prompt, sampling)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_writes_what_each_prompt_alone_does(settings, generator):
    sampling = Sampling(max_tokens=30, **settings)
    alone = [
        written(generator, [prompt], sampling.model_copy(update={"seed": (sampling.seed + i) % 2**63}))[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert written(generator, PROMPTS, sampling) == alone


@pytest.mark.parametrize("settings", SETTINGS)
def test_drafts_from_the_corpus_change_nothing_and_save_steps(settings, model, generator, tokenizer):
    sampling = Sampling(max_tokens=30, **settings)
    plain = written(generator, PROMPTS, sampling)
    learnt = [i for ids in plain[:2] for i in ids] + [1, 2, 3] + plain[3][:20] + [4, 5] * 10  # right and wrong drafts
    drafting = Generator(model, tokenizer, CorpusIndex(learnt))
    pieces = list(drafting.stream(PROMPTS, sampling))
    assert written(drafting, PROMPTS, sampling) == plain
    assert len(pieces) < 30 * len(PROMPTS)


def test_drafts_for_one_sequence_leave_room_for_another_that_is_nearly_done(model, generator, tokenizer):
    sampling, prompts = Sampling(max_tokens=6, temperature=1), ["ROMEO: O", "O"]
    first, second = written(generator, prompts, sampling)
    learnt = tokenizer.encode(prompts[0]) + first[:3] + [7, 7] + second[1:]  # early drafts for one, late for the other
    assert written(Generator(model, tokenizer, CorpusIndex(learnt)), prompts, sampling) == [first, second]


def test_nothing_is_written_that_the_model_was_not_trained_to_see(model, generator, monkeypatch):
    reserved = []
    monkeypatch.setattr(
        KVCache, "reserve", lambda cache, n, whole=KVCache.reserve: reserved.append(n) or whole(cache, n)
    )
    written(generator, PROMPTS, Sampling(max_tokens=40))
    assert max(reserved) == model.trained_length
    assert [context_start(n, 12) for n in (1, 12, 13, 18, 19, 24, 25)] == [0, 0, 6, 6, 12, 12, 18]
    assert {n - context_start(n, 5) for n in range(6, 50)} == {4, 5}  # an odd length, half of it rounded down
    assert {n - context_start(n, 1) for n in range(1, 9)} == {1}  # half of it is no token


def test_a_reader_is_told_once_that_the_context_slides(generator):
    def notices(prompt, n):
        return [piece.notice for piece in generator.stream([prompt], Sampling(max_tokens=n)) if piece.notice]

    assert notices("O", 5) == []
    assert notices("O", 40) == [
        "the text is longer than the model can see: it sees the last 6 to 12 tokens, as many as it was trained on"
    ]
    assert [notice[:24] for notice in notices(PROMPTS[2], 40)] == ["the prompt has 18 tokens"]


def test_a_stop_text_ends_one_sequence_and_not_the_others(generator):
    free = [generator.text(prompt, Sampling(max_tokens=20, seed=i)) for i, prompt in enumerate(PROMPTS)]
    stop = free[0][len(PROMPTS[0]) + 20 :][:3]
    texts, ends = list(PROMPTS), {}
    for piece in generator.stream(PROMPTS, Sampling(max_tokens=20, stop=(stop,))):
        texts[piece.sequence] += piece.text
        ends[piece.sequence] = piece.finished
    assert ends[0] == "stop"
    assert set(ends.values()) == {"stop", "length"}
    for text, whole, prompt in zip(texts, free, PROMPTS, strict=True):
        assert text == prompt + whole[len(prompt) :].partition(stop)[0]


@pytest.mark.parametrize("drafting", [False, True])
def test_a_text_ends_where_the_model_samples_the_end_of_its_document(model, generator, tokenizer, drafting):
    sampling = Sampling(max_tokens=20, temperature=1)
    free = written(generator, PROMPTS, sampling)
    ending = free[0][5]  # the sixth token of the first text, which shall be the end of a document
    learnt = [*tokenizer.encode(PROMPTS[0]), *free[0][:5], ending, 7]
    changed = Generator(model, tokenizer, CorpusIndex(learnt) if drafting else None)
    changed.vocabulary = Vocabulary.full(50304)
    changed.vocabulary.used[ending] = tokenizer.eot
    stop = tokenizer.decode(free[0][:5])[-1] + "☃☃"  # has begun where the document ends, and never comes
    texts, ends, notices = [""] * len(PROMPTS), {}, set()
    for piece in changed.stream(PROMPTS, sampling.model_copy(update={"stop": (stop,)})):
        texts[piece.sequence] += piece.text
        ends |= {piece.sequence: piece.finished} if piece.finished else {}
        notices |= {piece.notice} if piece.finished == "end" else set()
    assert ends[0] == "end"
    assert notices == {"the model has ended its document"}
    for text, ids in zip(texts, free, strict=True):
        assert text == tokenizer.decode(ids[: ids.index(ending)] if ending in ids else ids)


def test_pieces_join_to_the_text_of_all_tokens(generator, tokenizer):
    sampling = Sampling(max_tokens=60, temperature=1)  # random ids: many are parts of characters
    (ids,) = written(generator, ["O"], sampling)
    assert "O" + tokenizer.decode(ids) == generator.text("O", sampling)


def test_the_last_piece_of_each_sequence_says_how_it_ended(generator):
    for n in (0, 1, 5):
        pieces = list(generator.stream(["O", "o"], Sampling(max_tokens=n)))
        assert [piece.finished for piece in pieces if piece.finished] == ["length", "length"]
        assert sum(len(piece.ids) for piece in pieces) == 2 * n


def test_next_tokens_are_the_models_probabilities(model, generator, tokenizer):
    odds = generator.next_tokens("ROMEO:")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("ROMEO:")]))[0, -1]
    assert odds.shape == (50257,)
    assert torch.allclose(odds, logits[:50257].softmax(0), atol=1e-6)


def test_token_losses_are_those_of_windows_of_the_trained_length(model, generator):
    ids = list(range(100, 130))
    losses = generator.token_losses(ids)
    expected = []
    for begin in (0, 12, 24):
        inputs, targets = torch.tensor([ids[begin : begin + 12]]), torch.tensor([ids[begin + 1 : begin + 13]])
        with torch.no_grad():
            expected += model.token_losses(inputs[:, : targets.shape[1]], targets)[0].tolist()
    assert losses == pytest.approx(expected, abs=1e-4)
    assert len(losses) == 29
    assert generator.token_losses([5]) == generator.token_losses([]) == []


@pytest.mark.security
def test_the_representative_of_the_unused_ids_is_never_sampled(tokenizer):  # E4
    known = np.unique(tokenizer.encode("O Romeo, Romeo! wherefore art thou Romeo?"))
    folded = GPT(SHAPE, Vocabulary(known, 50304)).initialise(seed=1).eval()  # its last row has all but all probability
    generator = Generator(folded, tokenizer)
    assert set(written(generator, ["O zebra"], Sampling(max_tokens=50, temperature=1))[0]) <= set(known.tolist())
    assert generator.next_tokens("O").nonzero().flatten().tolist() == known.tolist()


@pytest.mark.security
def test_a_padded_id_is_never_sampled(tokenizer):  # E4
    model = GPT(SHAPE, Vocabulary.full(50304)).initialise(seed=1).eval()
    with torch.no_grad():
        model.ln_f.bias.fill_(1)
        model.wte.weight[50257:] = 100.0  # the padded ids would win by far
    assert max(written(Generator(model, tokenizer), ["O"], Sampling(max_tokens=20, temperature=1))[0]) < 50257


@pytest.mark.security
def test_odd_prompts_are_text_or_refused(generator):  # E2
    for prompt in ["<|endoftext|>", "\ud800", "a\0b", "🎭" * 100, "<script>alert(1)</script>", "x" * 1_000_000]:
        assert generator.text(prompt, Sampling(max_tokens=1)).startswith(prompt)
    with pytest.raises(InputError, match="1,000,001 characters"):
        generator.text("x" * 1_000_001, Sampling(max_tokens=1))


def test_a_model_in_training_writes_as_in_eval_mode_and_stays_in_training(tokenizer):
    model = lively(GPT(SHAPE.model_copy(update={"dropout": 0.5}), Vocabulary.full(50304)))
    sober = written(Generator(model, tokenizer), ["O"], Sampling(max_tokens=10))
    model.train()
    assert written(Generator(model, tokenizer), ["O"], Sampling(max_tokens=10)) == sober
    assert model.training
