"""Complete a prompt with several samples, and measure how much of each is copied from the training text."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.data.corpus_index import Passage, novelty
from pipeline.model.sampling import Sampling
from webapp.fields import checked_int, checked_prompt
from webapp.html import split_text
from webapp.model_source import Served

MAX_SAMPLES = 4
MAX_TOKENS = 2_000
REFRESH_S = 0.12


@dataclass
class Completion:
    """The samples of one prompt generated so far."""

    served: Served
    prompt_ids: list[int]
    seed: int
    samples: list[list[int]]  # new tokens only
    passages: list[list[Passage]] = field(default_factory=list)  # of each sample and its prompt, in the training text
    finished: bool = False
    notice: str | None = None
    model_s: float = 0.0  # time spent generating, without the time to show the text

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.samples))

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.model_s if self.model_s else 0.0

    def ids(self, sample: int) -> list[int]:
        return self.prompt_ids + self.samples[sample]

    def novelty(self, sample: int) -> float:
        """Share of a sample's new tokens outside of all passages that the training text contains."""
        return novelty(self.passages[sample], len(self.prompt_ids), len(self.ids(sample)))

    def find_passages(self) -> Self:
        """Set `passages` to those of the samples so far."""
        find, at_least = self.served.corpus.passages, self.served.min_passage
        self.passages = [find(self.ids(sample), at_least) for sample in range(len(self.samples))]
        return self

    def text(self, sample: int) -> str:
        """A sample without its prompt."""
        return split_text(self.served.tokenizer, self.ids(sample), [len(self.prompt_ids)])[1]


def complete(served: Served, prompt: Any, samples: Any, **numbers: Any) -> Iterator[Completion]:
    """Complete `prompt`; yield the same object every REFRESH_S, and at the end with `finished` true.

    Closing the iterator stops generation. Raises InputError for invalid input, before it yields anything.
    """
    prompt, n = checked_prompt(prompt), checked_int("samples", samples, 1, MAX_SAMPLES)
    checked_int("max_tokens", numbers.get("max_tokens", 0), 0, MAX_TOKENS)  # before Sampling's higher limit
    sampling = Sampling.of(**numbers)
    completion = Completion(served, served.tokenizer.encode(prompt), sampling.seed, [[] for _ in range(n)])
    shown = started = time.perf_counter()
    for piece in served.engine.stream([prompt] * n, sampling):
        completion.samples[piece.sequence] += piece.ids
        completion.notice = piece.notice or completion.notice
        now = time.perf_counter()
        completion.model_s += now - started
        if now - shown >= REFRESH_S:
            yield completion.find_passages()
            shown = time.perf_counter()
        started = time.perf_counter()
    completion.finished = True
    yield completion.find_passages()
