"""provenance: ids -> where they stand in the training text, word for word, and what follows there.

A suffix array: the places of the text, sorted by what stands there, so that all places that begin alike lie together
and a search is a bisection. Source: Manber and Myers 1993 (prefix doubling).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.data.token_files import Tokens

INDEXED_TOKENS = 10_000_000  # of a longer text the beginning: about 10 s and 0.5 GB to build


class Passage(NamedTuple):
    """Tokens `begin` up to `end` are those of the training text from `place` on."""

    begin: int
    end: int
    place: int


class CorpusIndex:
    """The training text, ready to be searched; about a second for a million tokens, 44 bytes each, of which 12 stay."""

    def __init__(self, ids: npt.ArrayLike, n_text: int = 0) -> None:
        """`ids`: (N,) token ids below 65,536; `n_text`: tokens of the text of which they are the beginning."""
        self.ids = np.asarray(ids, dtype=np.uint16)
        self.n_text = max(n_text, len(self.ids))
        self._places = suffix_array(self.ids)
        self._bytes = _as_bytes(self.ids)

    @classmethod
    def of(cls, tokens: Tokens) -> Self:
        """Index a part of the corpus, of a long one the beginning."""
        return cls(tokens.read(0, min(len(tokens), INDEXED_TOKENS)), len(tokens))

    @property
    def limits(self) -> str | None:
        """What is not looked at, in words; None where all of the text is."""
        if (n := len(self.ids)) == self.n_text:
            return None
        return f"Only the first {n:,} of the {self.n_text:,} tokens of the training text are searched"

    def passages(self, ids: Sequence[int], at_least: int = 8) -> list[Passage]:
        """All that stands in the text for `at_least` tokens on end, as long as can be, in order; two may overlap."""
        lengths = [*self._suffixes(ids), -1]
        found: list[Passage] = []
        for end, length in enumerate(lengths[:-1], start=1):
            if length < at_least or lengths[end] == length + 1:  # too short, or not yet at its end
                continue
            place = int(self._places[self._interval(ids[end - length : end])[0]])
            found.append(Passage(end - length, end, place))
        return found

    def novelty(self, ids: Sequence[int], prompt_length: int, at_least: int = 8) -> float:
        """Share of the tokens after the prompt that lie in no passage; 0 where there are none."""
        n_new = len(ids) - prompt_length
        known = {i for begin, end, _ in self.passages(ids, at_least) for i in range(max(begin, prompt_length), end)}
        return (n_new - len(known)) / n_new if n_new else 0.0

    def following(self, ids: Sequence[int]) -> tuple[int, dict[int, int]]:
        """Length of the longest end of `ids` after which the text goes on somewhere, and how often with which id."""
        length = self._longest_end(ids, self._goes_on)
        low, high = self._interval(ids[len(ids) - length :])
        after = self._places[low:high] + length
        nexts, counts = np.unique(self.ids[after[after < len(self.ids)]], return_counts=True)
        return length, dict(zip(nexts.tolist(), counts.tolist(), strict=True))

    def draft(self, ids: Sequence[int], n: int, at_least: int = 2) -> list[int]:
        """Guess up to `n` ids: how the text goes on after the longest end of `ids`, where that is `at_least` long."""
        length = self._longest_end(ids, self._goes_on)
        if length < at_least:
            return []
        low, high = self._interval(ids[len(ids) - length :])
        after = int(self._places[low:high][:2].min()) + length  # of two places one at most is the text's end
        guess: list[int] = self.ids[after : after + n].tolist()
        return guess

    def _suffixes(self, ids: Sequence[int]) -> list[int]:
        """For each n, how long the longest end of ids[: n + 1] is that occurs; it grows by one at most."""
        lengths: list[int] = []
        for end in range(1, len(ids) + 1):
            longest = lengths[-1] + 1 if lengths else 1
            lengths.append(self._longest_end(ids[end - longest : end], self._occurs))
        return lengths

    def _longest_end(self, ids: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> int:
        """Length of the longest end of `ids` of which `holds` is true; it is of every shorter one as well."""
        if len(ids) and holds(ids):
            return len(ids)
        bound = 1  # gallop: most ends are short
        while bound < len(ids) and holds(ids[len(ids) - bound :]):
            bound *= 2
        lengths = range(1, min(bound, len(ids)) + 1)
        return bisect_left(lengths, True, key=lambda length: not holds(ids[len(ids) - length :]))

    def _occurs(self, ids: Sequence[int]) -> bool:
        low, high = self._interval(ids)
        return low < high

    def _goes_on(self, ids: Sequence[int]) -> bool:
        """Whether `ids` occurs elsewhere than at the end of the text."""
        low, high = self._interval(ids)
        return high - low > 1 or (high > low and int(self._places[low]) + len(ids) < len(self.ids))

    def _interval(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where in `_places` those lie at which `ids` stands."""
        pattern, text = _as_bytes(ids), self._bytes
        width = len(pattern)
        key: Callable[[int], bytes] = partial(_slice, text, width)
        low = bisect_left(self._places, pattern, key=key)
        return low, bisect_right(self._places, pattern, lo=low, key=key)


def suffix_array(ids: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Places 0 ... N - 1, sorted by the rest of `ids`, (N,), that begins there."""
    n, width = len(ids), 1
    rank = ids.astype(np.int64) + 1  # 0 is the end of the text
    while True:
        later = np.concatenate([rank[width:], np.zeros(min(width, n), np.int64)])[:n]
        pairs = rank * (max(n, 2**16) + 2) + later  # sorted so far by `width` ids, now by twice as many
        order = np.argsort(pairs)
        rank = np.empty(n, np.int64)
        rank[order] = np.cumsum(np.diff(pairs[order], prepend=-1) != 0)
        width *= 2
        if n == 0 or rank[order[-1]] == n:
            return order


def _slice(text: bytes, width: int, place: int) -> bytes:
    return text[2 * place : 2 * place + width]


def _as_bytes(ids: npt.ArrayLike) -> bytes:
    """Big-endian, so that bytes sort as the ids do."""
    return np.asarray(ids, dtype=">u2").tobytes()
