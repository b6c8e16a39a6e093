"""Find where ids occur in the training text, and what follows them there.

A suffix array has the places of the text sorted by the suffix that begins there, so that equal beginnings lie together
and a search is a bisection. Source: Manber and Myers 1993 (prefix doubling).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
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
    """A searchable training text: about a second to build for a million tokens, 44 bytes each, of which 12 stay."""

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
        """What is not searched, in words; None where all of the text is."""
        if (n := len(self.ids)) == self.n_text:
            return None
        return f"Only the first {n:,} of the {self.n_text:,} tokens of the training text are searched"

    def passages(self, ids: Sequence[int], at_least: int = 8) -> list[Passage]:
        """The longest passages of `at_least` tokens that occur in the text, in order; two may overlap."""
        found: list[Passage] = []
        length = 0  # of the longest suffix of ids[:end] that occurs
        for end in range(1, len(ids) + 1):
            before, length = length, self._longest_suffix(ids[end - 1 - length : end], self._occurs)
            if length <= before >= at_least:
                found.append(self._passage(ids, end - 1, before))
        return [*found, self._passage(ids, len(ids), length)] if length >= at_least else found

    def _passage(self, ids: Sequence[int], end: int, length: int) -> Passage:
        low, _ = self._interval(ids[end - length : end])
        return Passage(end - length, end, int(self._places[low]))

    def novelty(self, ids: Sequence[int], prompt_length: int, at_least: int = 8) -> float:
        """Share of the tokens after the prompt that lie in no passage; 0 where there are none."""
        n_new = len(ids) - prompt_length
        known = {i for begin, end, _ in self.passages(ids, at_least) for i in range(max(begin, prompt_length), end)}
        return (n_new - len(known)) / n_new if n_new else 0.0

    def following(self, ids: Sequence[int]) -> tuple[int, dict[int, int]]:
        """Length of the longest suffix of `ids` that the text continues, and how often with which id."""
        length, places = self.continuations(ids)
        nexts, counts = np.unique(self.ids[places], return_counts=True)
        return length, dict(zip(nexts.tolist(), counts.tolist(), strict=True))

    def continuations(self, ids: Sequence[int], at_least: int = 0) -> tuple[int, npt.NDArray[np.int64]]:
        """Length of the longest suffix of `ids` that the text continues, and the places after it, (K,).

        There are none where that suffix is shorter than `at_least`.
        """
        length = self._longest_suffix(ids, self._continues)
        if length < at_least:
            return length, np.empty(0, np.int64)
        low, high = self._interval(ids[len(ids) - length :])
        after = self._places[low:high] + length
        return length, after[after < len(self.ids)]

    def _longest_suffix(self, ids: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> int:
        """Length of the longest suffix of `ids` for which `holds` is true, as it is for every shorter one."""
        if len(ids) and holds(ids):
            return len(ids)
        bound = 1  # gallop: most are short
        while bound < len(ids) and holds(ids[len(ids) - bound :]):
            bound *= 2
        lengths = range(1, min(bound, len(ids)) + 1)
        return bisect_left(lengths, True, key=lambda length: not holds(ids[len(ids) - length :]))

    def _occurs(self, ids: Sequence[int]) -> bool:
        low, high = self._interval(ids)
        return low < high

    def _continues(self, ids: Sequence[int]) -> bool:
        """Whether `ids` occurs anywhere but at the end of the text."""
        low, high = self._interval(ids)
        return high - low > 1 or (high > low and int(self._places[low]) + len(ids) < len(self.ids))

    def _interval(self, ids: Sequence[int]) -> tuple[int, int]:
        """Range of `_places` at which `ids` occurs."""
        pattern = _as_bytes(ids)

        def key(place: int) -> bytes:
            return self._bytes[2 * place : 2 * place + len(pattern)]

        low = bisect_left(self._places, pattern, key=key)
        return low, bisect_right(self._places, pattern, lo=low, key=key)


def suffix_array(ids: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Places 0 ... N - 1, sorted by the suffix of `ids`, (N,), that begins there."""
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


def _as_bytes(ids: npt.ArrayLike) -> bytes:
    """Big-endian, so that bytes sort as the ids do."""
    return np.asarray(ids, dtype=">u2").tobytes()
