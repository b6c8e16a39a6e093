"""The figures of an evaluation equal those of plain formulas."""

import copy
from collections import Counter
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from pipeline.config.params import load_params
from pipeline.config.sections import EvaluateConfig, ModelConfig, OptimConfig, TrainConfig, WindowsConfig
from pipeline.data.batches import Split, TrainingData, steps_of
from pipeline.data.token_files import Tokens, write_shard
from pipeline.data.vocab import Vocabulary
from pipeline.model import evaluate
from pipeline.model.evaluate import corpus_loss, evaluate_model, recall_starts, verbatim_recall, window_figures
from pipeline.model.generator import Generator
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling
from pipeline.model.weights import save_model
from pipeline.system import files
from pipeline.system.device import prepare_machine
from pipeline.training.loop import fresh_state, train_steps

T = 16
IDS = torch.from_numpy(np.random.default_rng(1).integers(0, 32, 200))


def split_of(ids):
    return Split(
        Tokens("text", [ids.numpy().astype(np.uint16)], 32), Vocabulary(np.arange(32), 32), torch.device("cpu")
    )


SPLIT = split_of(IDS)
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=32, dropout=0.0, fold_vocab=True)


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


def test_one_pass_gives_the_corpus_loss_bit_for_bit_the_loss_by_position_and_the_accuracy(model):
    figures = window_figures(model, SPLIT, T, nullcontext())
    assert figures.loss == corpus_loss(model, SPLIT, T, nullcontext())
    counts = [13] * 7 + [12] * 9  # 12 windows of 16 targets and one of 7
    assert np.average(figures.position_loss, weights=counts) == pytest.approx(figures.loss, rel=1e-6)
    with torch.no_grad():
        hits = sum(
            (model(IDS[None, i : min(i + T, 199)])[0].argmax(1) == IDS[i + 1 : i + T + 1]).sum().item()
            for i in range(0, 199, T)
        )
    assert figures.top1_accuracy == pytest.approx(hits / 199)


class NoFloat64(torch.Tensor):
    """A tensor of a device that has no float64, as MPS."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        if function is torch.Tensor.double or any(x is torch.float64 for x in (*args, *(kwargs or {}).values())):
            raise TypeError("this device has no float64")
        return super().__torch_function__(function, types, args, kwargs)


def test_a_device_without_float64_gives_the_same_figures_and_texts(model, tokenizer):
    without = copy.deepcopy(model)
    for layer in list(without.modules()):
        for name, weight in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(weight.detach().as_subclass(NoFloat64), requires_grad=False))
    assert isinstance(without(IDS[None, :T]), NoFloat64)  # the control: it is passed on
    for figures in (window_figures, corpus_loss):
        assert figures(without, SPLIT, T, nullcontext()) == figures(model, SPLIT, T, nullcontext())
    starts = [0, 5, 40]
    assert verbatim_recall(without, SPLIT, starts, nullcontext()) == verbatim_recall(
        model, SPLIT, starts, nullcontext()
    )
    texts = [Generator(m, tokenizer).text("!", Sampling(max_tokens=5, seed=1)) for m in (without, model)]
    assert texts[0] == texts[1]
    assert torch.equal(*(Generator(m, tokenizer).next_tokens("!") for m in (without, model)))


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


@pytest.fixture
def trained(model, bpe, tmp_path):
    """What the stage `evaluate` reads, and a record of a run as all versions of the code have written it."""
    (tokens := tmp_path / "tokens").mkdir()
    for part, ids in (("train", IDS), ("val", IDS[:20])):
        write_shard(tokens / f"{part}-00000.bin", [ids], 32)
    files.write_manifest(tokens)
    save_model(tmp_path / "model", model, bpe)
    train = load_params().section(TrainConfig).model_dump(exclude={"processes"})
    return tmp_path, {
        "fingerprint": "f", "n_params": 1, "data_sha256": files.sha256_file(tokens / "manifest.json"),
        "params": {"train": {**train, "device": "cpu"}},
        "environment": {"device": "AVX512, a CPU by any name", "precision": "fp32", "threads": 1},
        "results": {"target_loss": 0.1, "to_target": {}},
    }  # fmt: skip


def test_a_model_is_evaluated_on_the_device_of_its_parameters(trained, model, monkeypatch):
    folder, run = trained
    bars = []
    monkeypatch.setattr(evaluate, "tqdm", lambda **given: bars.append(tqdm(**given | {"disable": False})) or bars[0])
    config = EvaluateConfig(recall_places=2, seed=1)
    metrics, position_loss = evaluate_model(folder / "model", folder / "tokens", run, config)
    assert metrics["corpus_loss"] == pytest.approx(corpus_loss(model, SPLIT, T, nullcontext()))
    assert metrics["validation_loss"] > 0
    assert len(position_loss) == T
    assert bars[0].n == bars[0].total  # the bar ends full


def test_each_token_file_is_hashed_once_by_a_stage(trained, bpe, monkeypatch):
    folder, run = trained
    hashed, sha256_file = Counter(), files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.update([path.name]) or sha256_file(path))
    evaluate_model(folder / "model", folder / "tokens", run, EvaluateConfig(recall_places=2, seed=1))
    assert (hashed["train-00000.bin"], hashed["val-00000.bin"]) == (1, 1)
    TrainingData.read(folder / "tokens", bpe, T, 32, True, torch.device("cpu"))
    assert (hashed["train-00000.bin"], hashed["val-00000.bin"]) == (2, 2)
