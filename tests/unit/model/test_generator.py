"""Generation with a KV cache, drafts and batches gives the same text as the plain way, without any of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_model

from pipeline.config.sections import ModelConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import Generator, RunningBatch, TextStream, context_start, load_generator
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling, sample
from pipeline.system.errors import InputError, ModelMissing

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50304, dropout=0.0, fold_vocab=True)
PROMPTS = ["ROMEO:", "", "First Citizen:\nBefore we proceed any further, hear me speak, and then some more", "O"]


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    """Few ids, so that sampling is fast: the first thousand, those of the prompts, and the end of text."""
    of_prompts = [token for prompt in PROMPTS for token in tokenizer.encode(prompt)]
    return Vocabulary(np.unique([*range(1000), *of_prompts, tokenizer.eot]), 50304)


@pytest.fixture(scope="module")
def model(vocabulary):
    return random_model(SHAPE, vocabulary, noise=0.3)


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return Generator(model, tokenizer)


def write(generator, prompts, sampling):
    """What the pieces of each sequence add up to."""
    written = [SimpleNamespace(ids=[], text="", ends=[], notices=[]) for _ in prompts]
    for piece in generator.stream(prompts, sampling):
        one = written[piece.sequence]
        one.ids += piece.ids
        one.text += piece.text
        one.ends += filter(None, [piece.finished])
        one.notices += filter(None, [piece.notice])
    return written


def text_after(tokenizer, ids):
    """The text of `ids` after a prompt."""
    return tokenizer.decode([*tokenizer.encode("O"), *ids])[1:]


def ids_of(generator, prompts, sampling):
    return [written.ids for written in write(generator, prompts, sampling)]


def uncached(model, tokenizer, prompt, sampling):
    """The plain way: the whole context through the model for each token."""
    ids, source = tokenizer.encode(prompt) or [tokenizer.eot], torch.Generator().manual_seed(sampling.seed)
    compact_ids, used = model.vocabulary.fold(torch.tensor(ids)).tolist(), model.vocabulary.used
    for _ in range(sampling.max_tokens):
        context = compact_ids[context_start(len(compact_ids), model.trained_length) :]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1]
        logits[len(used) :] = -torch.inf
        compact_ids.append(sample(logits, sampling, compact_ids, source))
    return used[compact_ids[len(ids) :]].tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 3},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 2**63 - 1},
    ],
)
def test_cache_batches_and_drafts_change_no_token(values, model, generator, tokenizer):
    sampling = Sampling(max_tokens=26, **values)  # more than twice the trained length
    seeds = [(sampling.seed + i) % 2**63 for i in range(len(PROMPTS))]
    plain = [
        uncached(model, tokenizer, prompt, sampling.model_copy(update={"seed": seed}))
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert ids_of(generator, PROMPTS, sampling) == plain
    right_and_wrong = [*plain[0], *plain[1], 1, 2, 3, *plain[3][:20], *[4, 5] * 10]
    pieces = list(Generator(model, tokenizer, CorpusIndex(right_and_wrong)).stream(PROMPTS, sampling))
    assert [[i for piece in pieces if piece.sequence == n for i in piece.ids] for n in range(4)] == plain
    assert len(pieces) < sum(map(len, plain))  # fewer steps than tokens


def test_a_full_context_slides_by_half():
    assert [context_start(n, 12) for n in (1, 12, 13, 18, 19, 24, 25)] == [0, 0, 6, 6, 12, 12, 18]
    assert {n - context_start(n, 5) for n in range(6, 50)} == {4, 5}  # an odd length, half of it rounded down
    assert {n - context_start(n, 1) for n in range(1, 9)} == {1}  # half of it is no token


def test_one_notice_says_that_the_context_slides(generator):
    short, sliding = (write(generator, ["O"], Sampling(max_tokens=n))[0].notices for n in (5, 40))
    limit = "the model reads only the last 6 to 12 tokens, as in training"
    assert (short, sliding) == ([], [f"the text is longer than the context: {limit}"])
    (long_prompt,) = write(generator, [PROMPTS[2]], Sampling(max_tokens=40))
    assert long_prompt.notices == [f"the prompt has 18 tokens, but {limit}"]


def test_a_stop_text_ends_only_its_sequence(generator):
    free = [written.text for written in write(generator, PROMPTS, Sampling(max_tokens=20))]
    stop = free[0][20:23]
    stopped = write(generator, PROMPTS, Sampling(max_tokens=20, stop=(stop,)))
    assert [written.text for written in stopped] == [text.partition(stop)[0] for text in free]
    ends = [["stop" if stop in text else "length"] for text in free]
    assert [written.ends for written in stopped] == ends
    assert ["length"] in ends


@pytest.mark.parametrize("drafting", [False, True])
def test_a_text_ends_at_the_end_of_text_token(model, generator, tokenizer, vocabulary, drafting):
    sampling = Sampling(max_tokens=20, temperature=1)
    free = ids_of(generator, PROMPTS, sampling)
    ending = free[0][5]  # the sixth token of the first text becomes the end-of-text token
    corpus = CorpusIndex([*tokenizer.encode(PROMPTS[0]), *free[0][:5], ending, 7]) if drafting else None
    changed = Generator(model, tokenizer, corpus)
    changed.vocabulary = Vocabulary(vocabulary.used.numpy(), 50304)
    changed.vocabulary.used[vocabulary.fold(torch.tensor(ending))] = tokenizer.eot
    stop = tokenizer.decode(free[0][:5])[-1] + "☃☃"  # it has begun where the document ends, and never comes
    for written, ids in zip(write(changed, PROMPTS, sampling.model_copy(update={"stop": (stop,)})), free, strict=True):
        assert written.text == text_after(tokenizer, ids[: ids.index(ending)] if ending in ids else ids)
        assert written.ends == ["end" if ending in ids else "length"]
        assert ("the model has ended its document" in written.notices) == (ending in ids)


@pytest.mark.parametrize("n", [0, 1, 30])
def test_each_sequence_has_its_tokens_as_text_and_says_once_how_it_ended(n, generator, tokenizer):
    sampling = Sampling(max_tokens=n, temperature=1, seed=5)  # random ids: many are parts of characters
    for written in write(generator, ["O", "o"], sampling):
        assert (len(written.ids), written.ends) == (n, ["length"])
        assert written.text == text_after(tokenizer, written.ids)
    assert generator.text("O", sampling) == "O" + write(generator, ["O"], sampling)[0].text


def test_next_tokens_are_the_models_probabilities(model, generator, tokenizer, vocabulary):
    expected = torch.zeros(50257)
    with torch.no_grad():
        logits = model(vocabulary.fold(torch.tensor([tokenizer.encode("ROMEO:")])))[0, -1]
    expected[vocabulary.used] = logits[:-1].softmax(0)
    assert torch.allclose(generator.next_tokens("ROMEO:"), expected, atol=1e-6)


def test_token_losses_are_those_of_windows_of_the_trained_length(model, generator, vocabulary):
    ids = [*range(100, 104), 40_000, *range(105, 130)]  # the training text lacks one
    assert 40_000 not in vocabulary.used
    expected, compact_ids = [], vocabulary.fold(torch.tensor(ids))
    for begin in (0, 12, 24):
        targets = compact_ids[None, begin + 1 : begin + 13]
        with torch.no_grad():
            expected += model.token_losses(compact_ids[None, begin : begin + targets.shape[1]], targets)[0].tolist()
    assert len(expected) == 29
    assert generator.token_losses(ids) == pytest.approx(expected, abs=1e-4)
    assert generator.token_losses([5]) == generator.token_losses([]) == []


def test_padding_and_ids_that_the_training_text_lacks_are_never_sampled(tokenizer):  # E4
    known = np.unique(tokenizer.encode("O Romeo, Romeo! wherefore art thou Romeo?"))
    folded = GPT(SHAPE, Vocabulary(known, 50304)).initialise(seed=1).eval()  # its last id has nearly all probability
    sampling = Sampling(max_tokens=50, temperature=1)
    assert set(ids_of(Generator(folded, tokenizer), ["O zebra"], sampling)[0]) <= set(known.tolist())
    assert Generator(folded, tokenizer).next_tokens("O").nonzero().flatten().tolist() == known.tolist()

    padded = GPT(SHAPE, Vocabulary.full(50304)).initialise(seed=1).eval()
    with torch.no_grad():
        padded.ln_f.bias.fill_(1)
        padded.wte.weight[50257:] = 100.0  # without a mask, they would nearly always be sampled
    assert max(ids_of(Generator(padded, tokenizer), ["O"], sampling)[0]) < 50257


def test_any_prompt_is_text_or_refused(generator):  # E2
    for prompt in ("<|endoftext|>", "\ud800", "a\0b", "🎭" * 100, "x" * 1_000_000):
        assert generator.text(prompt, Sampling(max_tokens=1)).startswith(prompt)
    with pytest.raises(InputError, match="1,000,001 characters"):
        generator.text("x" * 1_000_001, Sampling(max_tokens=1))


def test_a_model_in_training_writes_as_in_eval_mode_and_remains_in_training(tokenizer, vocabulary):
    model = random_model(SHAPE.model_copy(update={"dropout": 0.5}), vocabulary, noise=0.3)
    in_eval_mode = ids_of(Generator(model, tokenizer), ["O"], Sampling(max_tokens=10))
    model.train()
    assert ids_of(Generator(model, tokenizer), ["O"], Sampling(max_tokens=10)) == in_eval_mode
    assert model.training


def streamed(stop, chunks):
    stream = TextStream(stop)
    return [stream.add(chunk, last=i == len(chunks) - 1) for i, chunk in enumerate(chunks)], stream.stopped


@pytest.mark.parametrize(
    ("stop", "chunks", "pieces", "stopped"),
    [
        ([], [b"a\xe4", b"\xbb\xe4", b"\xbb"], ["a", "�", ""], False),  # cut within a character, twice
        ([], [b"\xf0\x9f", b"\x8e", b"\xad!"], ["", "", "🎭!"], False),  # one character in three chunks
        ([], [b"a\xff", b"b\xf0\x9f"], ["a�", "b"], False),  # not UTF-8
        ([], [b"a\xff"], ["a�"], False),
        (["END", "\n\n"], [b"one\n", b"\ntwoEND", b"x"], ["one", "", ""], True),  # before the first of two
        (["\nROMEO:"], [b"x\nRO", b"ME", b"S y\n"], ["x", "", "\nROMES y\n"], False),  # held back while it may be one
    ],
)
def test_a_stream_gives_whole_characters_at_once_and_a_stop_text_never(stop, chunks, pieces, stopped):
    assert streamed(stop, chunks) == (pieces, stopped)


@settings(max_examples=20)
@given(st.text(), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=3), st.integers(1, 5))
def test_pieces_join_to_the_text_before_the_first_stop_text(text, stop, size):
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    first = min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))
    assert "".join(streamed(stop, chunks)[0]) == text[:first]


def test_log_probabilities_are_of_all_ids_and_the_same_when_a_text_is_written_and_when_it_is_scored(
    model, generator, vocabulary
):
    sampling = Sampling(max_tokens=30, temperature=1)  # with the prompt, it slides more than once
    batch = RunningBatch(generator)
    batch.add(generator.start("ROMEO:", sampling, n_top=3))
    (sequence,) = batch.sequences
    written = []
    while batch.sequences:
        written += [one for _, piece in batch.step() for one in piece.logprobs]
    scored = [one for window in generator.score(sequence.ids, 3) for one in window]
    assert [one.id for one in scored] == sequence.ids
    assert scored[0] == (sequence.ids[0], None, ())
    for one, other in zip(written, scored[-30:], strict=True):
        assert one.id == other.id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
    ids = [*range(100, 105), 40_000, *range(105, 110)]  # the training text lacks one
    within = [one.logprob for window in generator.score(ids, 1) for one in window]
    assert [-logprob for logprob in within[1:]] == pytest.approx(generator.token_losses(ids), abs=1e-4)
    with torch.no_grad():
        logits = model(vocabulary.fold(torch.tensor([ids[:1]])))[0, -1]
    assert within[1] == pytest.approx(float(logits.log_softmax(0)[vocabulary.fold(torch.tensor(ids[1]))]), abs=1e-4)


def test_sequences_of_one_prompt_share_its_ids_until_they_join_a_batch(generator, tokenizer):
    prompt = tokenizer.encode("ROMEO: O")
    before, sequences = list(prompt), [generator.start(prompt, Sampling(max_tokens=3), n, n) for n in range(3)]
    assert all(sequence.ids is prompt and not sequence.compact_ids for sequence in sequences)
    batch = RunningBatch(generator, sequences[:2])
    batch.add(sequences[2])
    batch.step()
    assert prompt == before
    assert all(sequence.ids[: len(prompt)] == prompt != sequence.ids for sequence in sequences)


def test_sequences_join_and_leave_a_batch_in_any_order(generator, chance):
    plans = [(n, Sampling(max_tokens=chance.randint(1, 30), temperature=1, seed=n)) for n in range(12)]
    expected = {n: write(generator, [PROMPTS[n % 4]], sampling)[0].ids for n, sampling in plans}
    batch, found, left = RunningBatch(generator), {n: [] for n, _ in plans}, set()
    while plans or batch.sequences:
        while plans and chance.random() < 0.4:
            n, sampling = plans.pop()
            batch.add(generator.start(PROMPTS[n % 4], sampling, number=n))
        if batch.sequences and chance.random() < 0.1:
            batch.remove(gone := chance.choice(batch.sequences))
            left.add(gone.number)
        for _, piece in batch.step() if batch.sequences else []:
            found[piece.sequence] += piece.ids
    for n, ids in found.items():
        assert ids == (expected[n][: len(ids)] if n in left else expected[n])


def test_a_version_without_a_model_or_without_tokens_is_missing(tmp_path):
    for part in ("model", "tokens"):
        with pytest.raises(ModelMissing, match=f"{part} not found: give the folder of a registered version"):
            load_generator(tmp_path)
        (tmp_path / part).mkdir()
