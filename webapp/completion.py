"""writing: a prompt and numbers, as anyone may send them -> samples that grow, with what is known of each."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.model.sampling import Sampling
from pipeline.system.errors import InputError
from webapp.html import LEAST_PASSAGE, cut
from webapp.model_source import Served

LONGEST_PROMPT = 10_000  # characters
MOST_SAMPLES = 4
MOST_TOKENS = 2_000
REDRAW_S = 0.12


@dataclass
class Writing:
    """Samples of one prompt, as far as they are written."""

    served: Served
    prompt_ids: list[int]
    seed: int
    samples: list[list[int]]  # new tokens only
    finished: bool = False
    notice: str | None = None
    model_s: float = 0.0  # what the model took, without the time to show it

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.samples))

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.model_s if self.model_s else 0.0

    def ids(self, sample: int) -> list[int]:
        return self.prompt_ids + self.samples[sample]

    def novelty(self, sample: int) -> float:
        """Share of a sample's own tokens that lie in no passage of the training text."""
        return self.served.corpus.novelty(self.ids(sample), len(self.prompt_ids), LEAST_PASSAGE)

    def text(self, sample: int) -> str:
        """A sample without its prompt."""
        return cut(self.served.tokenizer, self.ids(sample), [len(self.prompt_ids)])[1]

    @property
    def prompt_is_known(self) -> bool:
        """Whether the prompt stands in the training text, and that goes on after it."""
        return self.served.corpus.following(self.prompt_ids)[0] == len(self.prompt_ids)


def checked_prompt(prompt: Any) -> str:
    """A prompt that is text of a sane length; a lone surrogate becomes U+FFFD. Raises InputError."""
    if not isinstance(prompt, str):
        raise InputError(f"prompt {str(prompt)[:40]!r}: it should be text")
    if len(prompt) > LONGEST_PROMPT:
        raise InputError(f"the prompt has {len(prompt):,} characters: give {LONGEST_PROMPT:,} at most")
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def checked_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises InputError."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value and value % 1 == 0
    if not whole or not low <= value <= high:
        raise InputError(f"{name} {str(value)[:40]}: choose a whole number from {low:,} to {high:,}")
    return int(value)


def write(served: Served, prompt: Any, samples: Any, **numbers: Any) -> Iterator[Writing]:
    """Continue `prompt`, yielding the same object every now and then and once it is finished.

    Closing the iterator ends it. Raises InputError for wrong input, before anything is yielded.
    """
    prompt, n = checked_prompt(prompt), checked_whole("samples", samples, 1, MOST_SAMPLES)
    sampling = Sampling.of(**numbers)
    checked_whole("max_tokens", sampling.max_tokens, 0, MOST_TOKENS)
    writing = Writing(served, served.tokenizer.encode(prompt), sampling.seed, [[] for _ in range(n)])
    stream = served.generator.stream([prompt] * n, sampling)
    shown = started = time.perf_counter()
    for piece in stream:
        writing.samples[piece.sequence] += piece.ids
        writing.notice = piece.notice or writing.notice
        now = time.perf_counter()
        writing.model_s += now - started
        if now - shown >= REDRAW_S:
            yield writing
            shown = time.perf_counter()
        started = time.perf_counter()
    writing.finished = True
    yield writing
