"""The forecast of a run: what is timed, in proportion to what, and how it reaches the run's tags."""

import json
import math
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pipeline.config.params import load_params
from pipeline.data.batches import sliding_windows
from pipeline.data.vocab import Vocabulary
from pipeline.model.evaluate import MIN_BATCHES
from pipeline.system.device import Machine
from pipeline.system.distributed import World
from pipeline.system.errors import OutOfSpaceError
from pipeline.training import forecast as module
from pipeline.training import preflight
from pipeline.training import train as training
from pipeline.training.config import RunConfig
from pipeline.training.forecast import MODEL_COPIES, PROCESS_BYTES, Forecast, forecast, step_flops, token_flops
from pipeline.training.preflight import n_checkpoints, saved_bytes, step_bytes
from tests.trainings import Untracked

VOCABULARY = Vocabulary.of(np.arange(50257) < 100, 50257)
MACHINE = Machine(torch.device("cpu"), "fp32", 1)
COST = Forecast(0.25, 100.0, 20.0, 12.3456789, 3_000_000_000, 700)


def config_of(n_layer=2, micro_batch_size=4, accumulation=1, max_epochs=10.0, **target):
    whole = RunConfig.of(load_params())
    sizes = {"micro_batch_size": micro_batch_size, "gradient_accumulation_steps": accumulation}
    return replace(
        whole,
        model=whole.model.updated(n_layer=n_layer, n_head=2, n_embd=32, block_size=16, vocab_size=50257),
        windows=whole.windows.updated(seq_len=16, **sizes),
        optim=whole.optim.updated(max_epochs=max_epochs),
        target=whole.target.updated(**target),
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([3, 3, 1, 2, 4, 99], 7 / 3),  # after the warm-up, until the sum is 5
        ([1, 1, 8, 4, 99], 6),  # two steps at least
        ([14, 0.5, 0.5, 99], 0.5),  # no longer than 15 seconds in all
        ([20, 99], 20),  # a step that is longer than that is timed once
    ],
)
def test_steps_are_timed_after_the_warm_up_for_a_few_seconds(seconds, expected):
    assert module._mean_s(iter(seconds), 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "n_layer", "accumulation", "micro_batch_size"),
    [(1, 16, 4, 4), (0.6, 8, 4, 4), (0.2, 2, 4, 4), (0.05, 2, 1, 4), (0.02, 2, 1, 2), (0, 2, 1, 1)],
)
def test_a_long_step_is_timed_with_fewer_layers_then_batches_then_windows(
    share, n_layer, accumulation, micro_batch_size
):
    config = config_of(16, 4, 4)
    timed = module._timed_part(config, 10, share * step_flops(config, 10))
    sizes = timed.windows.gradient_accumulation_steps, timed.windows.micro_batch_size
    assert (timed.model.n_layer, *sizes) == (n_layer, accumulation, micro_batch_size)
    assert replace(timed, model=config.model, windows=config.windows) == config


def test_the_cost_of_the_whole_run_follows_from_what_was_timed(monkeypatch):
    config, small = config_of(8), config_of(2)
    monkeypatch.setattr(module, "TIMED_FLOPS", {"cpu": step_flops(small, VOCABULARY.n_rows)})
    monkeypatch.setattr(module, "_time", lambda timed, *_: (0.5, 0.001) if timed == small else None)
    cost = forecast(config, MACHINE, VOCABULARY, 1000, 100)
    layers, head = 12 * 32**2, VOCABULARY.n_rows * 32  # weights
    times = (6 * (8 * layers + head) + 12 * 8 * 32 * 16) / (6 * (2 * layers + head) + 12 * 2 * 32 * 16)
    assert cost.step_s == pytest.approx(0.5 * times)
    assert cost.train_s == pytest.approx(157 * cost.step_s)  # 10 epochs of 1000 tokens in steps of 64
    fixed, held_out, sliding = 63 * 16, 7 * 16, len(sliding_windows(1000, 16)) * 16  # tokens in padded windows
    assert sliding / 1000 == pytest.approx(16 / 7, rel=0.02)
    assert cost.evaluate_s == pytest.approx((3 * 1000 + fixed + sliding + held_out) * 0.001 * times)
    evaluated = math.ceil(sliding / MIN_BATCHES)
    assert cost.memory_bytes == step_bytes(config, VOCABULARY, MACHINE, evaluated) + PROCESS_BYTES
    checkpoint, model = saved_bytes(config, VOCABULARY)
    assert cost.disk_bytes == n_checkpoints(config.optim) * checkpoint + MODEL_COPIES * model
    assert token_flops(config, 10) == step_flops(config, 10) / 64


READS = {"corpus_loss": 7000, "sliding_loss": 16000}  # tokens in windows, besides those of the held-out text


@pytest.mark.parametrize(
    ("target", "n_held_out", "between"),
    [
        ({"rule": "sliding", "eval_interval": None}, 0, 2 * 16000),
        ({"rule": "sliding", "eval_interval": 30}, 0, 3 * 16000),
        ({"rule": "corpus", "eval_interval": 30}, 700, 3 * (7000 + 700)),
        ({"rule": "validation", "eval_interval": 30}, 700, 3 * 700),
        ({"rule": "validation", "eval_interval": None}, 700, 5 * 700),  # once an epoch
        ({"rule": "average", "eval_interval": None}, 0, 2 * 7000),
    ],
)
def test_the_tokens_of_evaluations_follow_from_the_rule_and_the_interval(target, n_held_out, between):
    reads = READS | {"validation_loss": n_held_out}
    found = module._evaluated_tokens(config_of(**target).target, 100, 20, reads)
    assert found == between + sum(reads.values())


def test_an_evaluation_reads_padded_windows():
    reads = module._read_tokens(16, 1000, 0)
    sliding = len(sliding_windows(1000, 16)) * 16
    assert reads == {"validation_loss": 0, "corpus_loss": 63 * 16, "sliding_loss": sliding}  # 63 targets more than 15
    assert module._read_tokens(16, 9, 2) == dict.fromkeys(reads, 16)  # texts that are shorter than a window


def test_of_a_long_text_only_some_windows_are_made(monkeypatch):
    exact, sliding = module._read_tokens(16, 50_000, 5_000), Mock(side_effect=sliding_windows)
    monkeypatch.setattr(module, "TEXT_TOKENS", 10_000)
    monkeypatch.setitem(module.LOSSES, "sliding_loss", ("train", sliding))
    assert module._read_tokens(16, 50_000, 5_000) == pytest.approx(exact, rel=0.01)
    sliding.assert_called_once_with(10_000, 16)


@pytest.mark.parametrize("n_tokens", [9, 500])  # shorter than a window, and longer
def test_real_steps_of_the_run_are_timed(monkeypatch, n_tokens):
    records = []
    real = module.train_steps
    monkeypatch.setattr(module, "train_steps", lambda *a: (records.append(r) or r for r in real(*a)))
    config = config_of()
    step_s, token_s = module._time(config, MACHINE, VOCABULARY, n_tokens, 0)
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert step_s == pytest.approx((records[2].step_s + records[3].step_s) / 2)
    assert 0 < token_s < 1
    assert records[-1].lr < 1e-3 * config.optim.lr  # at a higher rate, the loss on random ids may diverge


def test_of_several_processes_one_is_timed_with_its_share_of_the_batch(monkeypatch):
    config, four, timed = config_of(micro_batch_size=8), MACHINE._replace(world=World(0, 4, 0, 4), compiled=True), []
    monkeypatch.setattr(module, "_time", lambda *arguments: timed.append(arguments[:2]) or (0.5, 0.001))
    cost = forecast(config, four, VOCABULARY, 1000)
    assert timed == [(config_of(micro_batch_size=2), MACHINE)]
    assert cost.step_s == pytest.approx(0.5)
    assert cost.train_s == pytest.approx(79 * 0.5)  # 10 epochs of 1000 tokens in steps of 8 windows
    reads = module._read_tokens(config.windows.seq_len, 1000, 0)
    n_evaluated = module._evaluated_tokens(config.target, 79, 7, reads)
    assert cost.evaluation_s == pytest.approx(n_evaluated * 0.001 / 4)
    n_batch = -(-max(reads.values()) // MIN_BATCHES)
    assert cost.memory_bytes == step_bytes(config, VOCABULARY, four, n_batch) + PROCESS_BYTES
    assert (
        cost.disk_bytes - forecast(config, MACHINE, VOCABULARY, 1000).disk_bytes > 3 * 5000
    )  # states of random numbers
    monkeypatch.setattr(preflight, "free_bytes", lambda machine: 4 * step_bytes(config, VOCABULARY, four) - 1)
    with pytest.raises(OutOfSpaceError, match=r"^windows\.micro_batch_size 8 of"):
        forecast(config, four, VOCABULARY, 1000)


@pytest.mark.parametrize("outcome", [(0.5, 0.001), KeyboardInterrupt()])
def test_the_memory_of_the_timed_steps_is_given_back(monkeypatch, outcome):
    calls = []
    monkeypatch.setattr(module, "_time", Mock(side_effect=[outcome]))
    monkeypatch.setattr(module, "give_back_memory", lambda: calls.append("given back"))
    with suppress(KeyboardInterrupt):
        forecast(config_of(), MACHINE, VOCABULARY, 1000)
    assert calls == ["given back"]


def test_a_run_that_does_not_fit_is_refused_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(module, "_time", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(module, "TIMED_FLOPS", {"cpu": math.inf})
    with pytest.raises(OutOfSpaceError, match=r"^windows\.micro_batch_size 1000000000 of"):
        forecast(config_of(micro_batch_size=10**9), MACHINE, VOCABULARY, 1000)


def test_a_forecast_in_the_environment_becomes_tags_of_the_run(monkeypatch):
    given = []
    monkeypatch.setattr(training, "Recorder", Untracked)
    monkeypatch.setattr(Untracked, "recording", lambda _, *arguments: given.append(arguments[2]) or nullcontext())
    state, config = Namespace(step=0, tokens=0), config_of()
    run = Namespace(
        world=Namespace(is_main=True), state=state, max_steps=9, config=config, folder=Path("f"), identity={}
    )

    def tags():
        with training._tracked(run, Path(), {"study": "s"}):
            return given.pop()

    assert tags() == {"study": "s"}
    for name, value in COST.environment().items():
        monkeypatch.setenv(name, value)
    assert Forecast.of_environment() == COST
    assert tags() == {
        "study": "s",
        "forecast_step_s": "0.25",
        "forecast_train_s": "100.0",
        "forecast_evaluation_s": "20.0",
        "forecast_evaluate_s": "12.3457",
        "forecast_memory_bytes": "3000000000",
        "forecast_disk_bytes": "700",
    }


@pytest.mark.parametrize("value", ["", "{", "7", '{"step_s": 1}', json.dumps(COST._replace(step_s="soon")._asdict())])
def test_a_variable_that_is_not_a_forecast_is_ignored_with_one_line(monkeypatch, capsys, value):
    monkeypatch.setenv(module.VARIABLE, value)
    assert Forecast.of_environment() is None
    said = "the environment variable TOTARGET_FORECAST is not a forecast: the run gets no tags of it\n"
    assert capsys.readouterr().out == said
