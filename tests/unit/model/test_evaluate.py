"""The figures of an evaluation equal those of plain formulas."""

import copy
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config.sections import EvaluateConfig, ModelConfig
from pipeline.data.batches import Split, TrainingData, fixed_windows, sliding_windows
from pipeline.data.token_files import Tokens, write_shard
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.model import evaluate
from pipeline.model.evaluate import (
    WindowFigures,
    corpus_loss,
    evaluate_model,
    recall_places,
    sliding_loss,
    text_loss,
    verbatim_recall,
    window_figures,
)
from pipeline.model.generator import Generator
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling
from pipeline.model.weights import save_model
from pipeline.system import files
from pipeline.system.progress import Bar
from tests.mps import MPS, mps  # noqa: F401 (a fixture)

T = 16
IDS = torch.from_numpy(np.random.default_rng(1).integers(0, 32, 200))


VOCABULARY = Vocabulary(np.arange(32), 32)
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=32, dropout=0.5, fold_vocab=True)


def split_of(ids):
    return Split(Tokens("text", [ids.numpy().astype(np.uint16)], 32), VOCABULARY, torch.device("cpu"))


SPLIT = split_of(IDS)


@pytest.fixture(scope="module")
def model():
    """A model that knows much of SPLIT, not all."""
    model = GPT(SHAPE, VOCABULARY).initialise(seed=1).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(IDS[:192].view(-1, T), IDS[1:193].view(-1, T), 192).backward()
        optimizer.step()
    return model


def test_the_figures_of_the_windows_are_means_over_every_token_but_the_first(model):
    losses, hits = [], []
    for begin in range(0, 199, T):  # window by window, the last one short
        targets = IDS[begin + 1 : begin + T + 1]
        with torch.no_grad():
            logits = model(IDS[None, begin : begin + len(targets)])[0]
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        hits += (logits.argmax(1) == targets).tolist()
    assert len(losses) == 199
    figures = window_figures(model, SPLIT, T, nullcontext())
    assert figures.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures.loss == corpus_loss(model, SPLIT, T, nullcontext())  # bit for bit
    assert figures.position_loss == pytest.approx([np.mean(losses[i::T]) for i in range(T)], rel=1e-5)
    assert figures.top1_accuracy == pytest.approx(np.mean(hits))


def test_a_shift_moves_the_windows(model):
    shifted = corpus_loss(model, SPLIT, T, nullcontext(), shift=T // 2)
    assert shifted == pytest.approx(corpus_loss(model, split_of(IDS[T // 2 :]), T, nullcontext()))
    assert shifted > 2 * corpus_loss(model, SPLIT, T, nullcontext())  # fixed windows memorise one alignment


def test_the_sliding_loss_is_the_mean_over_all_tokens_after_at_least_half_a_window(model):
    losses = []
    for start, first in sliding_windows(200, T):
        targets = IDS[start + 1 : start + T + 1]
        with torch.no_grad():
            logits = model(IDS[None, start : start + len(targets)])[0]
        losses += F.cross_entropy(logits, targets, reduction="none")[first:].tolist()
    assert len(losses) == 199
    assert sliding_loss(model, SPLIT, T, nullcontext()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_an_evaluation_ends_early_where_the_loss_is_clearly_above_the_target(model, monkeypatch):
    windows, read = fixed_windows(200, T), []
    make_batch = evaluate.make_batch
    monkeypatch.setattr(
        evaluate, "make_batch", lambda split, batch, T: read.append(batch) or make_batch(split, batch, T)
    )
    loss, complete = text_loss(model, SPLIT, windows, T, nullcontext())
    assert complete
    assert len(read) == 13  # each of the 13 windows in a batch of its own
    for target, n_read in ((loss, 13), (loss / 100, 1)):
        read.clear()
        found = text_loss(model, SPLIT, windows, T, nullcontext(), target=target)
        assert (len(read), found.complete) == (n_read, n_read == 13)
        assert found.loss == loss if found.complete else found.loss > target


@pytest.mark.parametrize(
    ("estimates", "above"),
    [
        ([2.1], True),  # more than twice the target
        ([1.2, 1.2, 1.2], False),  # too few for a standard error
        ([1.1, 1.2, 1.3, 1.2], True),  # 1.2, standard error .04
        ([0.6, 1.8, 1.2, 1.2], False),  # 1.2, standard error .24
        ([0.9, 0.8, 0.9, 0.9], False),
    ],
)
def test_an_estimate_is_clearly_above_the_target_by_three_standard_errors(estimates, above):
    assert evaluate._is_clearly_above(estimates, target=1) is above


def test_mps_gives_the_same_figures_and_texts(model, tokenizer, mps):  # noqa: F811
    there, split = copy.deepcopy(model).to(MPS), SPLIT._replace(device=MPS)
    for figures in (window_figures, corpus_loss, sliding_loss):
        assert figures(there, split, T, nullcontext()) == figures(model, SPLIT, T, nullcontext())
    places = np.array([[0, 7], [5, 7], [40, 7]])
    recall = [verbatim_recall(m, s, places, nullcontext()) for m, s in ((there, split), (model, SPLIT))]
    assert recall[0] == recall[1]
    texts = [Generator(m, tokenizer).text("!", Sampling(max_tokens=5, seed=1)) for m in (there, model)]
    assert texts[0] == texts[1]
    assert torch.equal(*(Generator(m, tokenizer).next_tokens("!") for m in (there, model)))


def recited(model, given):
    """`given` and eight ids after it, the likeliest each time."""
    for _ in range(8):
        given = torch.cat([given, model(given[None])[0, -1].argmax()[None]])
    return given


@pytest.mark.parametrize("context", [8, 6])
def test_recall_is_what_greedy_decoding_recites(model, context):
    starts = list(range(0, 180, 7))
    exact = [torch.equal(recited(model, IDS[s : s + context]), IDS[s : s + context + 8]) for s in starts]
    assert 0 < sum(exact) < len(starts)  # some, not all: the comparison can fail
    places = np.array([[s, context - 1] for s in starts])
    assert verbatim_recall(model, SPLIT, places, nullcontext()) == np.mean(exact)
    mixed = np.array([[0, 7], *places])  # the longest context decides the length of the windows
    first = torch.equal(recited(model, IDS[:8]), IDS[:16])
    assert verbatim_recall(model, SPLIT, mixed, nullcontext()) == np.mean([first, *exact])


def test_the_places_of_recall_have_room_for_context_and_recital(model):
    model, config = copy.copy(model), EvaluateConfig(recall_places=200, seed=1)
    model.trained_length = 64
    aligned, shifted, anywhere = (recall_places(300, model, config, k) for k in ("aligned", "shifted", "anywhere"))
    assert aligned.tolist() == [[start, 31] for start in range(0, 237, 64)]
    assert len(shifted) == len(anywhere) == 200
    assert set(shifted[:, 1]) == {31}
    places = [tuple(each) for kind in (shifted, anywhere) for each in (kind.sum(axis=1) + 1)[None]]
    assert places[0] == places[1]  # the same places of the text
    model.trained_length = 128
    anywhere = recall_places(300, model, config, "anywhere")
    assert min(anywhere[:, 0]) >= 0
    assert 32 <= min(anywhere[:, 1]) + 1 < max(anywhere[:, 1]) + 1 <= 96
    assert max(anywhere.sum(axis=1)) + 32 < 300


def test_a_saved_model_is_evaluated_in_eval_mode_on_its_device_and_hashes_each_file_once(
    model, bpe, tmp_path, monkeypatch
):
    (tokens := tmp_path / "tokens").mkdir()
    for part, ids in (("train", IDS), ("val", IDS[:20])):
        write_shard(tokens / f"{part}-00000.bin", [ids], 32)
    files.write_manifest(tokens)
    save_model(tmp_path / "model", model, bpe)
    train = {"device": "cpu", "deterministic": True, "of_a_later_version": 1}
    run = {
        "fingerprint": "f", "n_params": 1, "data_sha256": files.sha256_file(tokens / "manifest.json"),
        "params": {"train": train},
        "environment": {"device": "AVX512, a CPU by any name", "precision": "fp32", "threads": 1},
        "results": {"target_loss": 0.1, "to_target": {}},
    }  # fmt: skip
    hashed, sha256_file = Counter(), files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.update([path.name]) or sha256_file(path))
    bars = []
    monkeypatch.setattr(evaluate, "Bar", lambda **given: bars.append(Bar(**given)) or bars[0])
    config = EvaluateConfig(recall_places=2, seed=1)
    metrics, position_loss = evaluate_model(tmp_path / "model", tokens, run, config)
    assert metrics["corpus_loss"] == pytest.approx(corpus_loss(model, SPLIT, T, nullcontext()))
    assert metrics["sliding_loss"] == pytest.approx(sliding_loss(model, SPLIT, T, nullcontext()))
    assert metrics["validation_loss"] > 0
    tokenizer, bits = load_tokenizer(bpe), {"sliding": IDS, "corpus": IDS, "validation": IDS[:20]}
    for name, ids in bits.items():  # of all tokens but the first
        length = len(tokenizer.decode_bytes(ids[1:].tolist())) / (len(ids) - 1)
        assert metrics[f"{name}_bits_per_byte"] == pytest.approx(metrics[f"{name}_loss"] / length / np.log(2))
    assert len(position_loss) == T
    assert bars[0].n == bars[0].total  # the bar ends full
    assert (hashed["train-00000.bin"], hashed["val-00000.bin"]) == (1, 1)
    TrainingData.read(tokens, bpe, T, 32, True, torch.device("cpu"))
    assert (hashed["train-00000.bin"], hashed["val-00000.bin"]) == (2, 2)
    monkeypatch.setattr(evaluate, "Bar", Bar)
    monkeypatch.setattr(evaluate, "window_figures", lambda *_: WindowFigures(710.0, [], 0.0))  # e^710 has no double
    assert evaluate_model(tmp_path / "model", tokens, run, config)[0]["corpus_perplexity"] is None
