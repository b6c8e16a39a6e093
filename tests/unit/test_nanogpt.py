"""The comparison with nanoGPT's settings: its schedule, its loop, and what the table says."""

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch

from benchmarks import nanogpt
from benchmarks.nanogpt import SETTINGS, Point, evaluate, plain, print_table, summary_of, with_own_ids
from pipeline.config.sections import ModelConfig
from pipeline.data.batches import Split, TrainingData
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.system.device import Machine

MACHINE = Machine(torch.device("cpu"), "fp32", 1)
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=9, dropout=0.0, fold_vocab=True)
SETTING = SETTINGS["cpu"]._replace(batch=3, warmup=2, eval_batches=2)


def test_the_learning_rate_is_warmed_up_and_falls_along_a_cosine():
    cpu = SETTINGS["cpu"]
    rates = [cpu.lr_at(step) for step in (1, 100, 1050, 2000)]
    assert rates == pytest.approx([1e-5, 1e-3, (1e-3 + 1e-4) / 2, 1e-4])


@pytest.fixture
def data():
    """A text with ids 2, 4 and 7 of nine, and a held-out one."""
    ids = np.array([2, 4, 7, 7, 4, 2, 2, 4] * 4, np.uint16)
    vocabulary = Vocabulary.of(np.bincount(ids, minlength=9), 9)
    train, held_out = (Split(Tokens(name, [ids], 9), vocabulary, MACHINE.device) for name in ("train", "val"))
    train, held_out = with_own_ids(train), with_own_ids(held_out)
    return TrainingData(train, held_out, train.vocabulary, None, "")


def test_nanogpts_text_has_ids_of_its_characters_alone(data):
    assert data.vocabulary.size == data.vocabulary.n_rows == 3
    assert data.train.tokens.read(0, 8).tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


def test_the_plain_loop_trains_a_model_without_biases(data, monkeypatch):
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **given: made.append(adamw(*groups, **given)) or made[0])
    steps = plain(Namespace(model=SHAPE, train=Namespace(seed=1)), MACHINE, data, SETTING)
    for n in range(1, 6):
        model, tokens, seconds, is_due = next(steps)
        assert (tokens, is_due) == (12 * n, False)
        assert seconds > 0
        assert made[0].param_groups[0]["lr"] == SETTING.lr_at(n)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    decayed, others = made[0].param_groups
    assert ({p.ndim for p in decayed["params"]}, {p.ndim for p in others["params"]}) == ({2}, {1})
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.1, 0.0, (0.9, 0.99))
    point = evaluate(model, MACHINE, data.validation, SETTING, 5, 60, 1.5)
    assert point[:3] == (5, 60, 1.5)
    assert point.loss == pytest.approx(np.log(3), abs=0.2)
    assert point.estimate == pytest.approx(point.loss, abs=0.2)  # the same text, other windows
    assert model.training


def test_a_run_answers_each_slice_with_its_evaluations_and_ends_by_itself(data, monkeypatch):
    def steps(*_):
        for n in range(1, 6):
            yield None, 10 * n, 1.0, n % 2 == 0  # a second each, and an evaluation after every other step

    answers = []
    pipe = Namespace(send=answers.append, recv=lambda: 2.0)
    monkeypatch.setattr(nanogpt, "prepare", lambda recipe, seed: (None, MACHINE, data))
    monkeypatch.setattr(nanogpt, "evaluate", lambda *given: given[-3:])
    monkeypatch.setitem(nanogpt.RUNS, "ours", steps)
    nanogpt.serve(pipe, "ours", "cpu", seed=1)
    assert answers == ["ready", (False, [(2, 20, 2.0)]), (False, [(4, 40, 4.0)]), (True, [])]


CURVE = [Point(100, 1000, 10.0, 2.0, 1.87), Point(200, 2000, 20.0, 1.9, 1.86), Point(300, 3000, 30.0, 1.95, 1.9)]


def test_the_table_compares_what_was_spent_until_the_target(capsys):
    slow, fast = summary_of(CURVE, 1.92), summary_of([CURVE[0]._replace(loss=1.9)], 1.92)
    assert (slow["to_target"]["step"], slow["to_target_on_random_windows"]["step"]) == (200, 100)
    assert (slow["best"]["loss"], slow["last"]["loss"]) == (1.9, 1.95)
    print_table({"nanoGPT's": slow, "ours": fast})
    assert "ours: 0.50 of its seconds, 0.50 of its tokens" in capsys.readouterr().out
    print_table({"nanoGPT's": summary_of(CURVE, 1.0), "ours": fast})
    out = capsys.readouterr().out
    assert ">3,000" in out
    assert "ours: at most 0.33 of its seconds" in out
    print_table({"nanoGPT's": slow, "ours": summary_of(CURVE, 1.0)})
    assert "of its seconds" not in capsys.readouterr().out
