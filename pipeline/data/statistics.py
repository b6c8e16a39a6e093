"""Describe a text: what it is made of, and the least loss that any model can reach on it.

Let c log c be summed over the groups of equal n-grams, c the size of a group. Over the same N places, the best guess of
the token after each (n-1)-gram costs (sum over (n-1)-grams - sum over n-grams) / N nats on average; and since the cost
of the tokens of a window telescopes, the difference between first tokens and whole windows is that of all targets.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import Tokenizer

STATISTICS_TOKENS = 5_000_000  # entropies of a larger text are those of its beginning: about 6 s and 0.6 GB
FREQUENT = 20
CONTEXTS = range(5)  # tokens before the next
LENGTHS = (32, 64, 128, 256, 512, 1024)  # tokens in a window

BASE = 0x9E3779B97F4A7C15  # of the rolling hash; odd, so that it has an inverse modulo 2**64

Integers = npt.NDArray[np.int64]


class NGrams:
    """Find the equal n-grams of a text, of any n, by rolling hashes of 64 bits (Karp and Rabin 1987)."""

    def __init__(self, ids: Integers) -> None:
        codes = np.random.default_rng(1).integers(2**64, size=2**16, dtype=np.uint64)  # of the ids
        powers = np.cumprod(np.full(len(ids), BASE, np.uint64))
        self._inverses = np.cumprod(np.full(len(ids), pow(BASE, -1, 2**64), np.uint64))
        self._sums = np.insert(np.cumsum(codes[ids] * powers), 0, 0)  # (N + 1,), modulo 2**64

    def c_log_c(self, n: int, n_places: int, stride: int = 1) -> float:
        """c log c over the groups of equal n-grams that start at one of the first `n_places`, or every few of them."""
        starts = slice(0, n_places, stride)
        hashes = (self._sums[n:][starts] - self._sums[starts]) * self._inverses[starts]
        _, counts = np.unique(hashes, return_counts=True)
        return float(counts @ np.log(counts))

    def mean_cost(self, context: int, whole: int, n_places: int, stride: int = 1) -> float:
        """Nats per token that it costs to continue n-grams of `context` tokens to `whole` tokens."""
        n_targets = len(range(0, n_places, stride)) * (whole - context)
        total = self.c_log_c(context, n_places, stride) - self.c_log_c(whole, n_places, stride)
        return round(total / max(n_targets, 1), 4)


def describe_corpus(train: Tokens, val: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
    """Figures of the training text, in nats where they are entropies; of `val` only the tokens are counted.

    Documents are separated by a token that is no text: it counts among the tokens, and has no bytes.
    """
    counts = train.counts()
    n_ends, used = int(counts[tokenizer.eot]), np.flatnonzero(counts)
    pieces = [tokenizer.decode_bytes([token]) if token != tokenizer.eot else b"" for token in used.tolist()]
    n_bytes, characters, line_ends = (
        int(counts[used] @ np.array([measure(piece) for piece in pieces], np.int64))
        for measure in (len, _characters, lambda piece: piece.count(b"\n"))
    )
    ids = train.read(0, min(len(train), STATISTICS_TOKENS)).astype(np.int64)
    frequent = np.lexsort((used, -counts[used]))[:FREQUENT]
    return {
        "bytes": n_bytes,
        "characters": characters,
        "lines": line_ends,
        "documents": n_ends + 1,
        "tokens": len(train),
        "validation_tokens": len(val),
        "distinct_ids": len(used),
        "bytes_per_token": round(n_bytes / len(train), 4),
        "characters_per_token": round(characters / len(train), 4),
        "frequent_tokens": [
            {"id": token, "text": tokenizer.decode([token]), "count": int(counts[token])}
            for token in used[frequent].tolist()
        ],
        "statistics_tokens": len(ids),
        "next_token_entropy": next_token_entropy(ids),
        "irreducible_loss": irreducible_loss(ids),
    }


def next_token_entropy(ids: Integers) -> dict[str, float]:
    """Nats that the next token costs who knows the k tokens before it, for each k."""
    grams = NGrams(ids)
    return {str(k): grams.mean_cost(k, k + 1, max(len(ids) - k, 0)) for k in CONTEXTS}


def irreducible_loss(ids: Integers) -> dict[str, dict[str, float]]:
    """Least mean loss on windows of T tokens, for each T that fits: fixed, one after the other, and shifted, anywhere.

    The best guess knows a target's place in the window, and what the window shows before it, but not where it is.
    """
    grams, lengths = NGrams(ids), [length for length in LENGTHS if length < len(ids)]
    return {
        "fixed": {str(T): grams.mean_cost(1, T + 1, len(ids) - T, stride=T) for T in lengths},
        "shifted": {str(T): grams.mean_cost(1, T + 1, len(ids) - T) for T in lengths},
    }


def _characters(piece: bytes) -> int:
    """Characters that begin in these bytes of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
