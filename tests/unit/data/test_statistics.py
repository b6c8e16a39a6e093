import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import statistics as diagnose
from pipeline.data.encode import write_tokens
from pipeline.data.statistics import describe_corpus, irreducible_loss, next_token_entropy
from pipeline.data.token_files import TokenFolder

quickly = settings(max_examples=20, deadline=None)
few_ids = st.lists(st.integers(0, 3), min_size=2, max_size=60).map(lambda ids: np.array(ids, np.int64))


def cost_of_guessing(pairs):
    """Mean of -log(share of this target among the targets of this context), as the definition says it."""
    contexts = Counter(context for context, _ in pairs)
    return -sum(math.log(count / contexts[context]) * count for (context, _), count in Counter(pairs).items()) / len(
        pairs
    )


@quickly
@given(ids=few_ids)
def test_the_entropy_is_the_cost_of_guessing_from_the_tokens_before(ids):
    entropy = next_token_entropy(ids)
    for k in range(min(5, len(ids))):
        pairs = [(tuple(ids[i - k : i]), ids[i]) for i in range(k, len(ids))]
        assert entropy[str(k)] == pytest.approx(cost_of_guessing(pairs), abs=1e-4)  # it is rounded to four places


@quickly
@given(ids=few_ids)
def test_the_irreducible_loss_is_the_cost_of_guessing_from_the_window_so_far(ids):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnose, "LENGTHS", (1, 2, 4, 8))
        losses = irreducible_loss(ids)
    for length in (1, 2, 4, 8):
        for kind, stride in (("fixed", length), ("shifted", 1)):
            starts = range(0, len(ids) - length, stride)
            if not starts:
                assert str(length) not in losses[kind]
                continue
            pairs = [(tuple(ids[start : start + t + 1]), ids[start + t + 1]) for start in starts for t in range(length)]
            assert losses[kind][str(length)] == pytest.approx(cost_of_guessing(pairs), abs=1e-4)


def test_the_whole_corpus_has_its_known_figures(shakespeare, tokenizer, tmp_path):
    write_tokens(shakespeare, tokenizer, tmp_path / "tokens")
    train, val = (folder := TokenFolder(tmp_path / "tokens")).train, folder.val
    figures = describe_corpus(train, val, tokenizer)
    text = shakespeare.read_text()
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
    }.items():
        assert list(figures["irreducible_loss"][kind].values()) == pytest.approx(published, abs=0.00051)  # three places


def test_statistics_of_a_large_text_are_those_of_its_beginning(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("caf\u00e9 \u6f22\n" * 30 + "end")
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", val_fraction=0.3)
    train, val = (folder := TokenFolder(tmp_path / "tokens")).train, folder.val
    monkeypatch.setattr(diagnose, "STATISTICS_TOKENS", 20)
    figures = describe_corpus(train, val, tokenizer)
    assert figures["statistics_tokens"] == 20
    assert figures["tokens"] == len(train) > 20
    assert figures["validation_tokens"] == len(val) > 0
    assert figures["characters"] == 7 * figures["lines"] == figures["bytes"] * 7 // 10
    assert figures["next_token_entropy"] == next_token_entropy(train.read(0, 20).astype(np.int64))


def test_the_ends_of_documents_are_counted_and_have_no_bytes(tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_bytes("one\ntwo\0漢<|endoftext|>\0x".encode())
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens")
    train, val = (folder := TokenFolder(tmp_path / "tokens")).train, folder.val
    figures = describe_corpus(train, val, tokenizer)
    assert (figures["documents"], figures["lines"]) == (3, 1)
    assert (figures["characters"], figures["bytes"]) == (7 + 14 + 1, 7 + 16 + 1)
    assert {"id": tokenizer.eot, "text": "<|endoftext|>", "count": 2} in figures["frequent_tokens"]
