"""The corpus index, compared with a plain search of the text."""

from collections import Counter

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data import corpus_index
from pipeline.data.corpus_index import CorpusIndex, Passage, novelty, suffix_array
from pipeline.data.token_files import Tokens

ids = st.lists(st.integers(0, 3) | st.sampled_from([256, 65535]), max_size=40)  # few ids, so that sequences repeat


def occurrences(text, part):
    return [start for start in range(len(text) - len(part) + 1) if text[start : start + len(part)] == part]


@given(ids)
@example([1, 0, 0])  # the end of the text sorts before any id
def test_the_suffix_array_sorts_the_suffixes(text):
    assert suffix_array(np.array(text, np.uint16)).tolist() == sorted(range(len(text)), key=lambda start: text[start:])


@given(ids, ids)
@example([0, 1, 2, 256, 1, 2, 3], [0, 1, 2, 3])  # two passages of the same length that overlap
def test_passages_are_the_maximal_sequences_that_occur_in_the_text(text, written):
    spans = [(begin, end) for begin in range(len(written)) for end in range(begin + 1, len(written) + 1)]
    found = {span: places for span in spans if (places := occurrences(text, written[slice(*span)]))}
    maximal = [
        (begin, end, min(places, key=lambda start: text[start:]))
        for (begin, end), places in found.items()
        if end - begin >= 2 and (begin - 1, end) not in found and (begin, end + 1) not in found
    ]
    assert CorpusIndex(text).passages(written, at_least=2) == maximal


def test_the_search_for_passages_encodes_each_token_of_a_copied_text_a_few_times_at_most(monkeypatch):
    text, n_encoded, encode = np.random.default_rng(1).integers(0, 50, 5000).tolist(), [], corpus_index._as_bytes
    index, written = CorpusIndex(text), [*text[100:2100], 50, *text[3000:4500], *text[2000:2500]]
    monkeypatch.setattr(corpus_index, "_as_bytes", lambda ids: n_encoded.append(len(ids)) or encode(ids))
    assert [passage.end - passage.begin for passage in index.passages(written)] == [2000, 1500, 500]
    assert sum(n_encoded) <= 2 * len(written)


def test_a_passage_is_maximal_and_has_its_position():
    first, too_short, last = [*range(20, 40)], [*range(3, 10)], [*range(60, 68)]
    passages = CorpusIndex(range(100)).passages([*first, 500, *too_short, *last])
    assert passages == [Passage(0, 20, 20), Passage(28, 36, 60)]


def test_novelty_is_the_share_of_the_tokens_that_are_in_no_passage():
    assert novelty([Passage(0, 10, 0)], 4, 12) == 2 / 8
    assert novelty([Passage(2, 9, 0), Passage(6, 10, 3)], 0, 12) == 4 / 12  # they overlap
    assert novelty([], 0, 4) == 1
    assert novelty([], 4, 4) == 0  # no tokens


@given(ids, ids)
def test_the_continuations_of_the_longest_suffix_are_counted(text, context):
    length, following = CorpusIndex(text).following(context)
    assert bool(following) == bool(text)  # the empty suffix has continuations
    for n in range(length, len(context) + 1):
        after = [start + n for start in occurrences(text, context[len(context) - n :]) if start + n < len(text)]
        assert Counter(text[position] for position in after) == (following if n == length else {})


def test_only_the_beginning_of_a_long_text_is_indexed_and_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr(corpus_index, "INDEXED_TOKENS", 6)
    index = CorpusIndex.of(Tokens("text", [np.arange(4, dtype=np.uint16), np.arange(4, 10, dtype=np.uint16)], 50257))
    assert (index.ids.tolist(), index.n_text) == ([0, 1, 2, 3, 4, 5], 10)
    assert index.limits == "Only the first 6 of the 10 tokens of the training text are searched"
    assert index.passages([3, 4, 5, 6], at_least=2) == [Passage(0, 3, 3)]
    whole = CorpusIndex.of(Tokens("text", [np.arange(6, dtype=np.uint16)], 50257))
    assert (whole.limits, whole.n_text) == (None, 6)
