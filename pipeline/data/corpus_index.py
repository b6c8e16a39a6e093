"""Search the training text for token sequences and their continuations, by a suffix array."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.data.token_files import Tokens

INDEXED_TOKENS = 10_000_000  # at most, from the beginning of the text; takes about 10 s and 0.5 GB


class Passage(NamedTuple):
    """Tokens `begin` up to `end` occur in the training text at `position`."""

    begin: int
    end: int
    position: int


def novelty(passages: Sequence[Passage], begin: int, end: int) -> float:
    """Share of the tokens `begin` up to `end` that are in none of the passages; 0 if there are no tokens."""
    known, n = {i for passage in passages for i in range(max(passage.begin, begin), passage.end)}, end - begin
    return (n - len(known)) / n if n else 0.0


class CorpusIndex:
    """Index of a training text. For a million tokens, building takes about 1 s and 44 MB, of which 12 MB remain."""

    def __init__(self, ids: npt.ArrayLike, n_text: int = 0) -> None:
        """`ids`: (N,) token ids below 65,536; `n_text`: length of the whole text if `ids` is only its beginning."""
        self.ids = np.asarray(ids, dtype=np.uint16)
        self.n_text = max(n_text, len(self.ids))
        self._positions = suffix_array(self.ids)
        self._bytes = _as_bytes(self.ids)

    @classmethod
    def of(cls, tokens: Tokens) -> Self:
        """Index the first INDEXED_TOKENS of a part of the corpus."""
        return cls(tokens.read(0, min(len(tokens), INDEXED_TOKENS)), len(tokens))

    @property
    def limits(self) -> str | None:
        """Sentence that says which part of the text is indexed; None if all of it is."""
        if (n := len(self.ids)) == self.n_text:
            return None
        return f"Only the first {n:,} of the {self.n_text:,} tokens of the training text are searched"

    def passages(self, ids: Sequence[int], at_least: int = 8) -> list[Passage]:
        """Maximal passages of `at_least` or more tokens that occur in the text, in order; they may overlap."""
        found: list[Passage] = []
        begin, low, high = 0, 0, len(self.ids)  # ids[begin:end] is the longest suffix of ids[:end] that occurs
        for end, token in enumerate(ids):
            interval = self._narrowed(low, high, end - begin, token)
            if interval[0] == interval[1]:
                if end - begin >= at_least:
                    found.append(Passage(begin, end, int(self._positions[low])))
                begin = end + 1 - self._longest_suffix(ids[begin + 1 : end + 1], self._occurs)
                interval = self._interval(ids[begin : end + 1])
            low, high = interval
        if len(ids) - begin >= at_least:
            found.append(Passage(begin, len(ids), int(self._positions[low])))
        return found

    def _narrowed(self, low: int, high: int, length: int, token: int) -> tuple[int, int]:
        """The part of `_positions`[low:high], where the same `length` tokens begin, at which `token` follows them."""
        n = len(self.ids)

        def key(position: int) -> int:
            return int(self.ids[position + length]) if position + length < n else -1

        low = bisect_left(self._positions, token, low, high, key=key)
        return low, bisect_right(self._positions, token, low, high, key=key)

    def following(self, ids: Sequence[int]) -> tuple[int, dict[int, int]]:
        """Length of the longest suffix of `ids` that has a continuation in the text, and next id -> count."""
        length, positions = self.continuations(ids)
        nexts, counts = np.unique(self.ids[positions], return_counts=True)
        return length, dict(zip(nexts.tolist(), counts.tolist(), strict=True))

    def continuations(self, ids: Sequence[int], at_least: int = 0) -> tuple[int, npt.NDArray[np.int64]]:
        """Length of the longest suffix of `ids` that has a continuation in the text, and the positions after it, (K,).

        The positions are empty if that suffix is shorter than `at_least`.
        """
        length = self._longest_suffix(ids, self._continues)
        if length < at_least:
            return length, np.empty(0, np.int64)
        low, high = self._interval(ids[len(ids) - length :])
        after = self._positions[low:high] + length
        return length, after[after < len(self.ids)]

    def _longest_suffix(self, ids: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> int:
        """Length of the longest suffix of `ids` for which `holds` is true; it is then true for the shorter ones too."""
        if len(ids) and holds(ids):
            return len(ids)
        bound = 1  # exponential search, since most are short
        while bound < len(ids) and holds(ids[len(ids) - bound :]):
            bound *= 2
        lengths = range(1, min(bound, len(ids)) + 1)
        return bisect_left(lengths, True, key=lambda length: not holds(ids[len(ids) - length :]))

    def _occurs(self, ids: Sequence[int]) -> bool:
        low, high = self._interval(ids)
        return low < high

    def _continues(self, ids: Sequence[int]) -> bool:
        """Whether an occurrence of `ids` in the text has a continuation."""
        low, high = self._interval(ids)
        return high - low > 1 or (high > low and int(self._positions[low]) + len(ids) < len(self.ids))

    def _interval(self, ids: Sequence[int]) -> tuple[int, int]:
        """Range of `_positions` at which `ids` occurs."""
        pattern = _as_bytes(ids)

        def key(position: int) -> bytes:
            return self._bytes[2 * position : 2 * position + len(pattern)]

        low = bisect_left(self._positions, pattern, key=key)
        return low, bisect_right(self._positions, pattern, lo=low, key=key)


def suffix_array(ids: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Sort the positions 0 ... N - 1 by the suffix of `ids`, (N,), that begins there.

    Prefix doubling, as in Manber and Myers 1993.
    """
    n, width = len(ids), 1
    rank = ids.astype(np.int64) + 1  # 0: end of the text
    while True:
        later = np.concatenate([rank[width:], np.zeros(min(width, n), np.int64)])[:n]
        pairs = rank * (max(n, 2**16) + 2) + later  # `rank` orders by `width` ids, `pairs` by twice as many
        order = np.argsort(pairs)
        rank = np.empty(n, np.int64)
        rank[order] = np.cumsum(np.diff(pairs[order], prepend=-1) != 0)
        width *= 2
        if n == 0 or rank[order[-1]] == n:
            return order


def _as_bytes(ids: npt.ArrayLike) -> bytes:
    """Encode ids big-endian, so that the bytes sort like the ids."""
    return np.asarray(ids, dtype=">u2").tobytes()
