"""Statistics of a text: counts, and the lowest loss that any model can reach on it.

With c(g) the number of times that the n-gram g occurs at N given positions, S(n) = sum over g of c(g) log c(g), and
the conditional entropy of the last token of these n-grams, given the n - 1 tokens before it, is

    H(n) = (S(n - 1) - S(n)) / N        nats per token

so that H(m + 1) + ... + H(n) = (S(m) - S(n)) / N: the loss of n - m successive tokens needs only two of these sums.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import Tokenizer

STATISTICS_TOKENS = 5_000_000  # at most, from the beginning of the text, for entropies; takes about 6 s and 0.6 GB
N_FREQUENT = 20  # tokens listed
CONTEXTS = range(5)  # number of tokens before the predicted one
LENGTHS = (32, 64, 128, 256, 512, 1024)  # tokens in a window
PASSAGE = 16  # tokens, in `ambiguity`
MAX_N = 6  # tokens of an n-gram, in `counts_loss`
KINDS = ("fixed", "shifted", "sliding")  # of windows

BASE = 0x9E3779B97F4A7C15  # of the rolling hash; odd, so that it has an inverse modulo 2**64

Integers = npt.NDArray[np.int64]


class NGrams:
    """Count the n-grams of a text, for any n, by rolling hashes of 64 bits (Karp and Rabin 1987)."""

    def __init__(self, ids: Integers) -> None:
        codes = np.random.default_rng(1).integers(2**64, size=2**16, dtype=np.uint64)  # a random code for each id
        powers = np.cumprod(np.full(len(ids), BASE, np.uint64))
        self._inverses = np.cumprod(np.full(len(ids), pow(BASE, -1, 2**64), np.uint64))
        self._sums = np.insert(np.cumsum(codes[ids] * powers), 0, 0)  # (N + 1,), modulo 2**64

    def hashes(self, n: int) -> npt.NDArray[np.uint64]:
        """Hash of each n-gram of the text, (N + 1 - n,)."""
        stop = len(self._sums) - n
        inverses: npt.NDArray[np.uint64] = np.append(self._inverses, np.uint64(0))
        hashes: npt.NDArray[np.uint64] = (self._sums[n:] - self._sums[:stop]) * inverses[:stop]
        return hashes

    def c_log_c(self, n: int, n_positions: int, stride: int = 1) -> float:
        """S(n) of the n-grams that start at every `stride`-th of the first `n_positions` positions."""
        starts = slice(0, n_positions, stride)
        hashes = (self._sums[n:][starts] - self._sums[starts]) * self._inverses[starts]
        _, counts = np.unique(hashes, return_counts=True)
        return float(counts @ np.log(counts))

    def mean_entropy(self, context: int, n: int, n_positions: int, stride: int = 1) -> float:
        """Mean entropy, in nats per token, of the tokens of n-grams after their first `context` tokens."""
        n_targets = len(range(0, n_positions, stride)) * (n - context)
        total = self.c_log_c(context, n_positions, stride) - self.c_log_c(n, n_positions, stride)
        return round(total / max(n_targets, 1), 4)


def describe_corpus(train: Tokens, val: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
    """Statistics of the training text, entropies in nats; of `val` only the number of tokens.

    The end-of-text token between documents counts as a token and has no bytes.
    """
    counts = train.counts()
    n_ends, used = int(counts[tokenizer.eot]), np.flatnonzero(counts)
    ends_inside = train.read(len(train) - 1, len(train))[0] != tokenizer.eot  # a document, which has no end of text
    pieces = [tokenizer.decode_bytes([token]) if token != tokenizer.eot else b"" for token in used.tolist()]
    n_bytes, characters, line_ends = (
        int(counts[used] @ np.array([measure(piece) for piece in pieces], np.int64))
        for measure in (len, _characters, lambda piece: piece.count(b"\n"))
    )
    ids = train.read(0, min(len(train), STATISTICS_TOKENS)).astype(np.int64)
    frequent = np.lexsort((used, -counts[used]))[:N_FREQUENT]
    return {
        "bytes": n_bytes,
        "characters": characters,
        "lines": line_ends,
        "documents": n_ends + int(ends_inside),
        "tokens": len(train),
        "validation_tokens": len(val),
        "distinct_ids": len(used),
        "bytes_per_token": round(n_bytes / len(train), 4),
        "characters_per_token": round(characters / len(train), 4),
        "frequent_tokens": [
            {
                "id": token,
                "text": tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace"),
                "count": int(counts[token]),
            }
            for token in used[frequent].tolist()
        ],
        "statistics_tokens": len(ids),
        "next_token_entropy": next_token_entropy(ids),
        "irreducible_loss": irreducible_loss(ids),
    }


def bytes_per_token(tokens: Tokens, tokenizer: Tokenizer) -> float:
    """Mean length, in bytes of UTF-8, of all tokens but the first: of the targets of a loss. The end of text has none.

    It is a loss in nats per token, divided by it, that can be compared between tokenizers; 0 for fewer than two tokens.
    """
    counts = tokens.counts()
    counts[tokens.read(0, min(1, len(tokens)))] -= 1
    used = [i for i in np.flatnonzero(counts).tolist() if i != tokenizer.eot]
    return sum(int(counts[i]) * len(tokenizer.decode_bytes([i])) for i in used) / max(1, len(tokens) - 1)


def bits_per_byte(loss: float | None, bytes_per_token: float) -> float | None:
    """A loss in nats per token as bits per byte; None without a loss, or for a text without bytes."""
    return None if loss is None or bytes_per_token == 0 else loss / (bytes_per_token * math.log(2))


def next_token_entropy(ids: Integers, contexts: Iterable[int] = CONTEXTS) -> dict[str, float]:
    """Entropy of a token given the k tokens before it, in nats, for each k of `contexts`."""
    grams = NGrams(ids)
    return {str(k): grams.mean_entropy(k, k + 1, max(len(ids) - k, 0)) for k in contexts}


def irreducible_loss(
    ids: Integers, lengths: Iterable[int] | None = None, kinds: Iterable[str] = KINDS
) -> dict[str, dict[str, float]]:
    """Lowest mean loss on windows of T tokens, for each T of `lengths`, or of LENGTHS, that is shorter than the text.

    `fixed`: fixed windows; `shifted`: windows that are shifted by any offset; `sliding`: the same, of targets with more
    than T/2 inputs only, as in sliding windows. The best model knows a target's position in the window and the tokens
    before it in the window, but not the window's position in the text.
    """
    grams, n, shorter = NGrams(ids), len(ids), [length for length in lengths or LENGTHS if length < len(ids)]
    of = {
        "fixed": lambda T: grams.mean_entropy(1, T + 1, n - T, stride=T),
        "shifted": lambda T: grams.mean_entropy(1, T + 1, n - T),
        "sliding": lambda T: grams.mean_entropy(T // 2 + 1, T + 1, n - T),
    }
    return {kind: {str(T): of[kind](T) for T in shorter} for kind in kinds}


def counts_loss(ids: Integers, held_out: int) -> float:
    """Loss of n-gram counts on the last `held_out` tokens, in nats per token: the lowest over n from 1 to MAX_N.

    Counts are of the tokens before, interpolated by Witten and Bell (1991): p(w | h) = (c(h w) + T(h) p(w | h')) /
    (c(h) + T(h)), where T(h) is the number of different tokens after h, and h' is h without its first token.
    """
    grams, split = NGrams(ids), len(ids) - held_out
    losses, p = [], np.full(held_out, 1 / len(np.unique(ids)))  # (held_out,)
    for n in range(1, min(MAX_N, split) + 1):
        whole, context = grams.hashes(n), grams.hashes(n - 1)
        known, first, n_known = np.unique(whole[: split - n + 1], return_index=True, return_counts=True)
        contexts, which, n_contexts = np.unique(context[: split - n + 1], return_inverse=True, return_counts=True)
        followers = np.bincount(which[first], minlength=len(contexts))
        asked, given = whole[split - n + 1 :], context[split - n + 1 : len(ids) - n + 1]
        at = np.searchsorted(known, asked).clip(max=len(known) - 1)
        times = np.where(known[at] == asked, n_known[at], 0)
        at = np.searchsorted(contexts, given).clip(max=len(contexts) - 1)
        p = np.where(contexts[at] == given, (times + followers[at] * p) / (n_contexts[at] + followers[at]), p)
        losses.append(float(-np.log(p).mean()))
    return min(losses)


def ambiguity(ids: Integers) -> float:
    """How little short passages say about their place: the mean over the text of log c, in nats.

    c is the number of times that the rarest trigram of the last PASSAGE tokens occurs in the text. 0: there is one in
    each passage that occurs nowhere else, or no trigram at all.
    """
    if len(ids) < 3:
        return 0.0
    _, which, counts = np.unique(NGrams(ids).hashes(3), return_inverse=True, return_counts=True)
    times = counts[which]  # (N - 2,), of the trigram that begins at each token
    rarest = np.lib.stride_tricks.sliding_window_view(times, min(PASSAGE - 2, len(times))).min(axis=1)
    return float(np.log(rarest).mean())


def _characters(piece: bytes) -> int:
    """Number of characters that begin in `piece`, a part of UTF-8 text."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
