"""The scheduler: requests join and leave a running batch, and none changes the text of another."""

import threading
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import random_model

import webapp.engine
from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import Generator, Piece, RunningBatch
from pipeline.model.sampling import Sampling, sample
from tests.waiting import wait_until
from webapp.engine import Busy, Engine, EngineFailed, Row, Stopped, TimedOut, stop_engines
from webapp.metrics import n_sequences
from webapp.openai_api.routes import Completion
from webapp.openai_api.schema import CompletionRequest

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50304, dropout=0.0, fold_vocab=True)
PROMPTS = ["ROMEO:", "", "Before we proceed any further, hear me speak, and then some more of it", "O", "To be", "x y"]


@pytest.fixture(scope="module")
def generator(tokenizer):
    ids = [token for prompt in PROMPTS for token in tokenizer.encode(prompt)]
    vocabulary = Vocabulary(np.unique([*range(300), *ids, tokenizer.eot]), 50304)
    return Generator(random_model(SHAPE, vocabulary, noise=0.3), tokenizer)


class Held:
    """A generator's steps wait until they are released."""

    def __init__(self, monkeypatch):
        self.steps = threading.Semaphore(0)
        step = RunningBatch.step

        def held(batch):
            assert self.steps.acquire(timeout=20)
            return step(batch)

        monkeypatch.setattr(RunningBatch, "step", held)

    def release(self, n=10_000):
        self.steps.release(n)


@pytest.fixture
def held(monkeypatch):
    return Held(monkeypatch)


def submit(engine, prompt, scored=False, **values):
    """The queue of the updates of a request with one row, and its job."""
    updates = SimpleQueue()
    sequence = engine.generator.start(prompt, Sampling(**{"max_tokens": 20, "temperature": 1, **values}))
    scores = engine.generator.score(sequence.ids, 1) if scored else None
    return updates, engine.submit([Row(sequence, scores)], updates.put)


def ids_of(updates):
    found = []
    while update := updates.get(timeout=20):
        assert isinstance(update, Piece), update
        found += update.ids
    return found


def alone(generator, prompt, **values):
    return [i for piece in generator.stream([prompt], Sampling(**values)) for i in piece.ids]


def test_requests_that_join_while_others_run_get_the_text_that_they_get_alone(generator, held):
    engine = Engine(generator, max_rows=3)
    values = [{"max_tokens": 7 + 5 * n, "temperature": 1, "seed": n} for n in range(len(PROMPTS))]
    sent = []
    for prompt, each in zip(PROMPTS, values, strict=True):
        sent.append(submit(engine, prompt, **each))
        held.release(3)
        assert wait_until(lambda: not held.steps._value, 20)
    assert len(engine._rows) <= 3
    held.release()
    for (updates, _), prompt, each in zip(sent, PROMPTS, values, strict=True):
        assert ids_of(updates) == alone(generator, prompt, **each)
    assert wait_until(lambda: engine._thread is None, 20)
    assert (len(engine._rows), len(engine._waiting)) == (0, 0)


def test_a_cancelled_request_leaves_and_the_next_one_takes_its_row(generator, held):
    engine = Engine(generator, max_rows=1)
    (first, job), (second, _) = submit(engine, "O"), submit(engine, "To be", max_tokens=3)
    other = submit(Engine(generator), "O", max_tokens=3)[0]  # of another version
    held.release(2)
    assert wait_until(lambda: (len(engine._rows), len(engine._waiting), held.steps._value) == (1, 1, 0), 20)
    assert n_sequences() == {"running": 2, "waiting": 1}
    job.cancel()
    held.release()
    assert (len(ids_of(second)), len(ids_of(other))) == (3, 3)
    assert wait_until(lambda: n_sequences() == {"running": 0, "waiting": 0}, 20)
    assert first.qsize() < 20


def test_a_full_queue_refuses_and_a_late_request_is_told(generator, held):
    engine = Engine(generator, max_rows=1, max_waiting=1)
    kept = submit(engine, "O")[0]
    assert wait_until(lambda: len(engine._rows) == 1, 20)
    engine.timeout_s = 0.0
    late = submit(engine, "To be")[0]
    with pytest.raises(Busy, match="1 sequences are waiting"):
        submit(engine, "To be")
    with pytest.raises(Busy):  # the API does not encode a prompt that is refused
        Completion(
            CompletionRequest(prompt="To be", n=128), SimpleNamespace(engine=engine, generator=None, tokenizer=None)
        )
    held.release()
    error = late.get(timeout=20)
    assert isinstance(error, TimedOut)
    assert "the server is busy: try again later" in str(error)
    assert len(ids_of(kept)) == 20


def test_after_a_failed_step_all_are_told_and_the_next_request_is_served(generator, monkeypatch):
    engine = Engine(generator)
    monkeypatch.setattr(threading, "excepthook", lambda hook: None)
    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "step", lambda batch: 1 / 0)
        assert isinstance(submit(engine, "O")[0].get(timeout=20), EngineFailed)
    assert ids_of(submit(engine, "O", max_tokens=4)[0]) == alone(generator, "O", max_tokens=4, temperature=1)


def test_a_request_whose_sampling_fails_ends_alone(generator, held, monkeypatch, capsys):
    def failing(logits, sampling, *rest):
        return sample(logits, sampling, *rest) if sampling.seed else 1 / 0

    monkeypatch.setattr("pipeline.model.generator.sample", failing)
    engine = Engine(generator, max_rows=3)
    sent = [submit(engine, "O", seed=1)[0]]
    assert wait_until(lambda: len(engine._rows) == 1, 20)  # its first step waits, so that the others join together
    sent += [submit(engine, "O", seed=seed)[0] for seed in (0, 2)]
    held.release(1)
    assert wait_until(lambda: len(engine._rows) == 3, 20)
    held.release()
    assert isinstance(sent[1].get(timeout=20), EngineFailed)
    for seed, updates in ((1, sent[0]), (2, sent[2])):
        assert ids_of(updates) == alone(generator, "O", max_tokens=20, temperature=1, seed=seed)
    assert wait_until(lambda: engine._thread is None, 20)
    assert (len(engine._rows), "ZeroDivisionError" in capsys.readouterr().err) == (0, True)
    with pytest.raises(ZeroDivisionError):
        alone(generator, "O")


def test_when_the_server_stops_all_requests_are_told_and_the_threads_end(generator, held, monkeypatch):
    monkeypatch.setattr(webapp.engine, "ENGINES", engines := {Engine(generator, max_rows=1), Engine(generator)})
    sent = [submit(engine, "O")[0] for engine in engines for _ in range(2)]
    assert wait_until(lambda: all(len(engine._rows) for engine in engines), 20)
    held.release()
    stop_engines()
    assert [engine._thread for engine in engines] == [None, None]
    sent += [submit(engine, "O")[0] for engine in engines]  # a connection may still be open
    for updates in sent:
        while isinstance(update := updates.get(timeout=20), Piece):
            pass
        assert isinstance(update, Stopped)


def test_scores_come_before_the_tokens_and_without_tokens_alone(generator):
    for n in (0, 2):
        updates = submit(Engine(generator), PROMPTS[2], scored=True, max_tokens=n)[0]
        found = [updates.get(timeout=20)]
        while found[-1] is not None:
            found.append(updates.get(timeout=20))
        scores = [one for update in found[: -1 - max(n, 1)] for one in update.logprobs]
        assert [one.id for one in scores] == generator.tokenizer.encode(PROMPTS[2])
        assert [len(piece.ids) for piece in found[-1 - max(n, 1) : -1]] == ([1] * n or [0])


def test_closing_a_stream_cancels_it_and_an_error_reaches_its_reader(generator, held):
    engine = Engine(generator)
    pieces = engine.stream(["O"], Sampling(max_tokens=500))
    held.release(1)
    next(pieces)
    pieces.close()
    held.release()
    assert wait_until(lambda: engine._thread is None, 20)
    engine.timeout_s = -1.0
    with pytest.raises(TimedOut):
        list(engine.stream(["O"], Sampling()))
