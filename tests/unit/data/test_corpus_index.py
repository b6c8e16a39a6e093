"""The corpus index, compared with a plain search of the text."""

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data import corpus_index
from pipeline.data.corpus_index import CorpusIndex, Passage, suffix_array
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
def test_passages_are_all_sequences_that_occur_in_the_text(text, written):
    passages = CorpusIndex(text).passages(written, at_least=2)
    for begin, end, position in passages:
        assert written[begin:end] == text[position : position + end - begin]
    assert all(one.begin < other.begin and one.end < other.end for one, other in pairwise(passages))
    assert all(end - begin >= 2 for begin, end, _ in passages)
    marked = {i for begin, end, _ in passages for i in range(begin, end)}
    pairs = [i for i in range(len(written) - 1) if occurrences(text, written[i : i + 2])]
    assert marked == {i for pair in pairs for i in (pair, pair + 1)}


def test_a_passage_is_maximal_and_has_its_position():
    first, too_short, last = [*range(20, 40)], [*range(3, 10)], [*range(60, 68)]
    passages = CorpusIndex(range(100)).passages([*first, 500, *too_short, *last])
    assert passages == [Passage(0, 20, 20), Passage(28, 36, 60)]


def test_novelty_counts_the_tokens_after_the_prompt():
    index = CorpusIndex(range(100))
    assert index.novelty([*range(10), 500, 500], prompt_length=4) == 2 / 8
    assert index.novelty([500] * 4, prompt_length=0) == 1
    assert index.novelty([500] * 4, prompt_length=4) == 0  # no tokens after the prompt


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
