"""Continuous batching: one thread per loaded version continues the sequences of all requests together.

Waiting sequences join the batch between two steps, and finished or cancelled ones leave it.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias
from weakref import WeakSet

from pipeline.model.generator import Continuation, Generator, Piece, Prompt, RunningBatch, TokenLogprob
from pipeline.model.sampling import Sampling
from pipeline.system.errors import PipelineError
from webapp.metrics import BATCH_SIZE, FIRST_TOKEN_S, RUNNING, TOKENS, WAITING

MAX_ROWS = 32  # sequences in the batch
CACHE_BYTES = 2**30  # of keys and values, which may lower that number
MAX_WAITING = 256  # sequences; a request that finds so many waiting is refused
TIMEOUT_S = 300.0  # from a request to its last token
STOP_S = 5.0  # for the steps that run when the server stops
PREFILL_TOKENS = 512  # of prompts that join in one step, so that others wait no longer than that
FAILED = "the model failed: the server's log says why"
ONE_STEP = threading.Lock()  # the steps of two versions would compete for the cores


class Busy(PipelineError):  # noqa: N818 (an event, not a fault)
    """Too many sequences are waiting."""


class TimedOut(PipelineError):  # noqa: N818
    """A request was not finished in time."""


class Stopped(PipelineError):  # noqa: N818
    """The server stops."""


class EngineFailed(PipelineError):  # noqa: N818
    """A step of the model, or one of its sequences, failed; the server's log says why."""


class Scores(NamedTuple):
    """Log-probabilities of the next tokens of a prompt."""

    sequence: int
    logprobs: list[TokenLogprob]


Update: TypeAlias = Piece | Scores | PipelineError | None  # None: every sequence is finished


class Row:
    """A sequence of a job; `scores`: the log-probabilities of its prompt, which come before its pieces."""

    def __init__(self, sequence: Continuation, scores: Iterator[list[TokenLogprob]] | None = None) -> None:
        self.sequence, self.scores = sequence, scores
        self.job: Job


class Job:
    """A request in the engine."""

    def __init__(self, rows: Sequence[Row], emit: Callable[[Update], None], timeout_s: float) -> None:
        self.emit, self.cancelled = emit, False
        self.started = time.monotonic()
        self.deadline = self.started + timeout_s
        self.n_open, self.has_tokens = len(rows), False
        for row in rows:
            row.job = self

    def cancel(self) -> None:
        """Let its sequences leave the engine before the next step."""
        self.cancelled = True


class Engine:
    """Runs a Generator for several requests at once; its thread lives as long as there are any."""

    def __init__(self, generator: Generator, max_rows: int = MAX_ROWS, max_waiting: int = MAX_WAITING) -> None:
        self.generator, self.max_waiting, self.timeout_s = generator, max_waiting, TIMEOUT_S
        self.max_rows = max(1, min(max_rows, CACHE_BYTES // generator.decoder.cache_bytes))
        self._lock = threading.Lock()  # guards the next three
        self._waiting: deque[Row] = deque()
        self._rows: dict[Continuation, Row] = {}  # in the batch, or being scored
        self._thread: threading.Thread | None = None
        self._stopping = False
        ENGINES.add(self)

    def require_room(self) -> None:
        """Raise Busy if too many sequences are waiting."""
        if (n := len(self._waiting)) >= self.max_waiting:
            raise Busy(f"{n} sequences are waiting: try again later")

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Piece]:
        """As Generator.stream, together with other requests. Closing the iterator cancels the request.

        Raises InputError as it does, Busy, TimedOut, Stopped or EngineFailed.
        """
        updates: SimpleQueue[Update] = SimpleQueue()
        rows = [Row(self.generator.start(prompt, sampling, i, i)) for i, prompt in enumerate(prompts)]
        job = self.submit(rows, updates.put)
        try:
            while update := updates.get():
                if isinstance(update, PipelineError):
                    raise update
                assert isinstance(update, Piece)
                yield update
        finally:
            job.cancel()

    def submit(self, rows: Sequence[Row], emit: Callable[[Update], None]) -> Job:
        """Queue the rows of a request; `emit` gets its updates, the last one is None or an error, in another thread.

        Raises Busy.
        """
        job = Job(rows, emit, self.timeout_s)
        with self._lock:
            self.require_room()
            self._waiting.extend(rows)
            WAITING.inc(len(rows))
            TOKENS.labels("prompt").inc(sum(len(row.sequence.ids) for row in rows))
            if self._thread is None and rows:
                self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
                self._thread.start()
        return job

    def _run(self) -> None:
        """Run steps until no row is left. After an exception, which ends the thread, all requests get an error."""
        batch, scoring = RunningBatch(self.generator), deque[Row]()
        failed = True
        try:
            while self._admit(batch, scoring):
                if scoring:
                    self._score(batch, scoring)
                if batch.sequences:
                    self._step(batch)
            failed = False
        finally:
            if failed:
                self._fail()

    def _admit(self, batch: RunningBatch, scoring: deque[Row]) -> bool:
        """Let rows leave and join; return whether any is left. If not, the thread has ended for `submit`."""
        with self._lock:
            now = time.monotonic()
            for row in [*self._waiting, *self._rows.values()]:
                if not row.job.cancelled and (self._stopping or row.job.deadline < now):
                    row.job.cancel()
                    hint = "ask for fewer tokens" if row.job.has_tokens else "the server is busy: try again later"
                    late = TimedOut(f"not finished within {self.timeout_s:.0f} s: {hint}")
                    row.job.emit(Stopped("the server stops") if self._stopping else late)
            n_waiting = len(self._waiting)
            self._waiting = deque(row for row in self._waiting if not row.job.cancelled)
            WAITING.dec(n_waiting - len(self._waiting))
            for row in [row for row in self._rows.values() if row.job.cancelled]:
                self._leave(row, batch, scoring)
            n_tokens = 0
            while self._waiting and len(self._rows) < self.max_rows and n_tokens < PREFILL_TOKENS:
                row = self._waiting.popleft()
                WAITING.dec()
                n_tokens += min(len(row.sequence.ids), self.generator.trained_length)
                self._rows[row.sequence] = row
                RUNNING.inc()
                if row.scores:
                    scoring.append(row)
                else:
                    self._start(row, batch)
            if not self._rows and not self._waiting:
                self._thread = None
                return False
            return True

    def _start(self, row: Row, batch: RunningBatch) -> None:
        """Add a row to the batch, unless it has no token to generate."""
        if row.sequence.finished:
            self._emit(row, Piece(row.sequence.number, [], "", row.sequence.finished, None))
        else:
            batch.add(row.sequence)

    def _leave(self, row: Row, batch: RunningBatch, scoring: deque[Row]) -> None:
        """Remove a cancelled row."""
        del self._rows[row.sequence]
        RUNNING.dec()
        if row in scoring:
            scoring.remove(row)
        elif row.sequence in batch.sequences:
            batch.remove(row.sequence)

    def _score(self, batch: RunningBatch, scoring: deque[Row]) -> None:
        """Compute one window of the first row's scores; after the last one, its generation starts."""
        row = scoring[0]
        assert row.scores is not None
        with ONE_STEP:
            logprobs = next(row.scores, None)
        if logprobs is not None:
            row.job.emit(Scores(row.sequence.number, logprobs))
        else:
            scoring.popleft()
            self._start(row, batch)

    def _step(self, batch: RunningBatch) -> None:
        BATCH_SIZE.observe(len(batch.sequences))
        with ONE_STEP:
            pieces = batch.step()
        now, n_tokens = time.monotonic(), 0
        for sequence, piece in pieces:
            row = self._rows[sequence]
            if isinstance(piece, Exception):
                self._end(row.job, piece)
                continue
            n_tokens += len(piece.ids)
            if not row.job.has_tokens:
                row.job.has_tokens = True
                FIRST_TOKEN_S.observe(now - row.job.started)
            self._emit(row, piece)
        TOKENS.labels("completion").inc(n_tokens)

    def _emit(self, row: Row, piece: Piece) -> None:
        """Hand a piece to the request; after its last one, the row leaves."""
        job = row.job
        job.emit(piece)
        if piece.finished:
            del self._rows[row.sequence]
            RUNNING.dec()
            job.n_open -= 1
            if not job.n_open:
                job.emit(None)

    def _end(self, job: Job, error: Exception) -> None:
        """End a request of which a sequence failed; its sequences leave before the next step."""
        traceback.print_exception(error)
        if not job.cancelled:
            job.cancel()
            job.emit(EngineFailed(FAILED))

    def _fail(self) -> None:
        """Tell all requests that a step failed, and forget them; the next request starts another thread."""
        with self._lock:
            WAITING.dec(len(self._waiting))
            RUNNING.dec(len(self._rows))
            jobs = {row.job for row in [*self._waiting, *self._rows.values()]}
            self._waiting.clear()
            self._rows.clear()
            self._thread = None
        for job in jobs:
            job.emit(EngineFailed(FAILED))


ENGINES = WeakSet[Engine]()


def stop_engines() -> None:
    """End all requests with an error, later ones as well, and wait for the threads, at most STOP_S for all.

    The interpreter must not end while a thread is in a step: PyTorch would abort the process.
    """
    engines, deadline = list(ENGINES), time.monotonic() + STOP_S
    for engine in engines:
        engine._stopping = True
    for engine in engines:
        if thread := engine._thread:
            thread.join(max(0.0, deadline - time.monotonic()))
