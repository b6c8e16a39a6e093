"""Describe a text: what it is made of, and the least loss that any model can reach on it.

Let c log c be summed over the groups of equal n-grams, c the size of a group. Over the same N places, the best guess of
the token after each (n-1)-gram costs (sum over (n-1)-grams - sum over n-grams) / N nats on average; and since the cost
of the tokens of a window telescopes, the difference between first tokens and whole windows is that of all targets.
"""

from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import Tokenizer

STATISTICS_TOKENS = 5_000_000  # entropies of a larger text are those of its beginning: about 6 s and 0.6 GB
FREQUENT = 20
CONTEXTS = range(5)  # tokens before the next
LENGTHS = (32, 64, 128, 256, 512, 1024)  # tokens in a window

Integers = npt.NDArray[np.int64]


class NGrams(NamedTuple):
    """The places at which n-grams that occur more than once start, with a number for each distinct one."""

    places: Integers
    labels: Integers

    def extend(self, following: Integers) -> Self:
        """The longer n-grams that `following`, numbers of what comes after each, makes of these."""
        keys = self.labels * (following.max(initial=0) + 1) + following
        _, labels, counts = np.unique(keys, return_inverse=True, return_counts=True)
        return self._replace(labels=labels).at(counts[labels] > 1)

    def double(self, length: int, size: int) -> Self:
        """The n-grams of twice this `length` in a text of `size` tokens."""
        labels = np.full(size + length, -1)
        labels[self.places] = self.labels
        following = labels[self.places + length]
        repeated = following >= 0  # a whole with a unique half is unique
        return self.at(repeated).extend(following[repeated])

    def at(self, chosen: npt.NDArray[np.bool_]) -> Self:
        return self._replace(places=self.places[chosen], labels=self.labels[chosen])


def describe_corpus(train: Tokens, val: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
    """Figures of the training text, in nats where they are entropies; of `val` only the tokens are counted.

    Between two documents stands a token that is no text: it counts among the tokens, and has no bytes.
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
    entropy = {}
    grams = _empty_grams(len(ids))
    for k in CONTEXTS:
        context = grams.at(grams.places < len(ids) - k)
        grams = context.extend(ids[context.places + k])
        entropy[str(k)] = _nats(context.labels, grams.labels, len(ids) - k)
    return entropy


def irreducible_loss(ids: Integers) -> dict[str, dict[str, float]]:
    """Least mean loss on windows of T tokens, for each T that fits: fixed, one after the other, and shifted, anywhere.

    The best guess knows a target's place in the window, and what the window shows before it, but not where it is.
    """
    losses: dict[str, dict[str, float]] = {"fixed": {}, "shifted": {}}
    grams, length = _empty_grams(len(ids)).extend(ids), 1
    while length < min(max(LENGTHS) + 1, len(ids)):
        if length in LENGTHS:
            inputs = grams.at(grams.places < len(ids) - length)
            windows = inputs.extend(ids[inputs.places + length])  # with the last target
            for kind, stride in (("fixed", length), ("shifted", 1)):
                first = ids[: len(ids) - length : stride]
                whole = windows.at(windows.places % stride == 0)
                losses[kind][str(length)] = _nats(first, whole.labels, len(first) * length)
        grams, length = grams.double(length, len(ids)), 2 * length
    return losses


def _empty_grams(size: int) -> NGrams:
    return NGrams(np.arange(size), np.zeros(size, np.int64))


def _nats(contexts: Integers, wholes: Integers, targets: int) -> float:
    """Mean cost of the targets that make wholes of contexts."""
    return round((_c_log_c(contexts) - _c_log_c(wholes)) / max(targets, 1), 4)


def _c_log_c(labels: Integers) -> float:
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    return float(counts @ np.log(counts))


def _characters(piece: bytes) -> int:
    """Characters that begin in these bytes of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
