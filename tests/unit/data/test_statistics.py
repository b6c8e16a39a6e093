"""Statistics of a text, compared with their definitions and with published values."""

import math
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import statistics
from pipeline.data.statistics import (
    ambiguity,
    bits_per_byte,
    bytes_per_token,
    counts_loss,
    describe_corpus,
    irreducible_loss,
    next_token_entropy,
)
from pipeline.data.token_files import Tokens

few_ids = st.lists(st.integers(0, 3), min_size=2, max_size=60).map(lambda ids: np.array(ids, np.int64))


def tokens_of(tokenizer, text):
    return Tokens("text", [tokenizer.encode_documents(text.encode())], tokenizer.n_vocab)


def conditional_entropy(pairs):
    """Mean of -log p(target | context) over the pairs (context, target), with p counted from the same pairs."""
    contexts = Counter(context for context, _ in pairs)
    log_p = {pair: math.log(count / contexts[pair[0]]) for pair, count in Counter(pairs).items()}
    return -sum(log_p[pair] for pair in pairs) / len(pairs)


@given(ids=few_ids)
def test_the_entropy_is_that_of_a_token_given_the_tokens_before_it(ids):
    entropy = next_token_entropy(ids)
    for k in range(min(5, len(ids))):
        pairs = [(tuple(ids[i - k : i]), ids[i]) for i in range(k, len(ids))]
        assert entropy[str(k)] == pytest.approx(conditional_entropy(pairs), abs=1e-4)  # it is rounded to four places


@given(ids=few_ids)
def test_the_irreducible_loss_is_the_entropy_given_the_tokens_before_in_the_window(ids):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "LENGTHS", (1, 2, 4, 8))
        losses = irreducible_loss(ids)
    for length in (1, 2, 4, 8):
        for kind, stride, first in (("fixed", length, 0), ("shifted", 1, 0), ("sliding", 1, length // 2)):
            starts, positions = range(0, len(ids) - length, stride), range(first, length)
            pairs = [(tuple(ids[start : start + t + 1]), ids[start + t + 1]) for start in starts for t in positions]
            expected = {str(length): pytest.approx(conditional_entropy(pairs), abs=1e-4)} if pairs else {}
            assert {key: loss for key, loss in losses[kind].items() if key == str(length)} == expected


def test_the_statistics_of_tiny_shakespeare_are_the_published_ones(shakespeare, tokenizer):
    text = shakespeare.read_text()
    figures = describe_corpus(tokens_of(tokenizer, text), tokens_of(tokenizer, ""), tokenizer)
    assert figures["characters"] == len(text)
    assert figures["bytes"] == len(text.encode())
    assert figures["lines"] == text.count("\n")
    assert (figures["tokens"], figures["validation_tokens"], figures["distinct_ids"]) == (338_025, 0, 11_706)
    assert figures["documents"] == 1
    assert figures["frequent_tokens"][0] == {"id": 198, "text": "\n", "count": 39_996}  # and "\n\n" twice
    assert figures["statistics_tokens"] == 338_025
    for kind, published in {
        "fixed": (0.101, 0.042, 0.017, 0.007, 0.003, 0.001),
        "shifted": (0.200, 0.100, 0.050, 0.025, 0.013, 0.006),
        "sliding": (0, 0, 0, 0, 0, 0),
    }.items():
        assert list(figures["irreducible_loss"][kind].values()) == pytest.approx(published, abs=0.00051)  # three places


def test_all_documents_are_counted_and_entropies_are_those_of_the_beginning_of_a_large_text(tokenizer, monkeypatch):
    train = tokens_of(tokenizer, "caf\u00e9 \u6f22\n" * 30 + "end\0\u6f22<|endoftext|>\0x")
    monkeypatch.setattr(statistics, "STATISTICS_TOKENS", 20)
    figures = describe_corpus(train, val := tokens_of(tokenizer, "some text"), tokenizer)
    assert (figures["documents"], figures["lines"]) == (3, 30)
    assert describe_corpus(tokens_of(tokenizer, "one\0two\0"), val, tokenizer)["documents"] == 2  # the next is held out
    assert (figures["characters"], figures["bytes"]) == (7 * 30 + 3 + 14 + 1, 10 * 30 + 3 + 16 + 1)
    assert {"id": tokenizer.eot, "text": "<|endoftext|>", "count": 2} in figures["frequent_tokens"]
    assert r"'\\xa2'" in str(figures["frequent_tokens"])  # the last of three bytes
    assert (figures["tokens"], figures["validation_tokens"]) == (len(train), len(val))
    assert figures["statistics_tokens"] == 20 < len(train)
    assert figures["next_token_entropy"] == next_token_entropy(train.read(0, 20).astype(np.int64))


def test_bits_per_byte_are_those_of_all_tokens_but_the_first(tokenizer):
    tokens = tokens_of(tokenizer, "First naïve\0天 Citizen")
    ids = tokens.read(1, len(tokens)).tolist()
    n_bytes = len(tokenizer.decode_bytes(i for i in ids if i != tokenizer.eot))
    assert bytes_per_token(tokens, tokenizer) == n_bytes / len(ids)
    assert bits_per_byte(math.log(2), 1) == 1  # a token of one byte that is as likely as not
    assert bits_per_byte(3 * math.log(2), 3) == pytest.approx(1)
    assert bytes_per_token(tokens_of(tokenizer, ""), tokenizer) == 0
    assert bits_per_byte(1.0, 0) is bits_per_byte(None, 3) is None


def loss_by_definition(ids, held_out, n):
    """Mean loss of interpolated n-gram counts, by Witten and Bell's formula."""
    train = tuple(ids[:-held_out])

    def p(token, context):
        grams = [train[i : i + len(context) + 1] for i in range(len(train) - len(context))]
        lower = p(token, context[1:]) if context else 1 / len(set(ids))
        followers = [gram[-1] for gram in grams if gram[:-1] == context]
        if not followers:
            return lower
        different = len(set(followers))
        return (followers.count(token) + different * lower) / (len(followers) + different)

    targets = range(len(ids) - held_out, len(ids))
    return -sum(math.log(p(ids[i], tuple(ids[i - n + 1 : i]))) for i in targets) / held_out


@given(ids=few_ids, share=st.floats(0.1, 0.6))
def test_the_loss_of_counts_is_that_of_the_best_order(ids, share):
    held_out = max(1, int(share * len(ids)))
    ids = ids.tolist()
    losses = [loss_by_definition(ids, held_out, n) for n in range(1, min(6, len(ids) - held_out) + 1)]
    assert counts_loss(np.array(ids), held_out) == pytest.approx(min(losses))


@given(ids=st.lists(st.integers(0, 2), min_size=3, max_size=60), passage=st.integers(3, 8))
def test_a_passage_is_as_ambiguous_as_its_rarest_trigram_is_frequent(ids, passage):
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    counts, n = Counter(grams), min(passage - 2, len(grams))
    rarest = [min(counts[gram] for gram in grams[i : i + n]) for i in range(len(grams) - n + 1)]
    with patch.object(statistics, "PASSAGE", passage):
        assert ambiguity(np.array(ids)) == pytest.approx(sum(map(math.log, rarest)) / len(rarest))
