"""The corpus index against a plain search of the text."""

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import corpus_index
from pipeline.data.corpus_index import CorpusIndex, Passage, suffix_array
from pipeline.data.token_files import Tokens

ids = st.lists(st.integers(0, 3) | st.sampled_from([256, 65535]), max_size=40)  # few, so that much is repeated


def occurrences(text, part):
    return [place for place in range(len(text) - len(part) + 1) if text[place : place + len(part)] == part]


@given(ids)
def test_the_suffix_array_sorts_what_begins_at_each_place(text):
    assert suffix_array(np.array(text, np.uint16)).tolist() == sorted(range(len(text)), key=lambda place: text[place:])


@given(ids, ids)
def test_passages_are_in_the_text_and_nothing_else_is(text, written):
    passages = CorpusIndex(text).passages(written, at_least=2)
    for begin, end, place in passages:
        assert written[begin:end] == text[place : place + end - begin]
    assert all(one.begin < other.begin and one.end < other.end for one, other in pairwise(passages))
    assert all(end - begin >= 2 for begin, end, _ in passages)
    marked = {i for begin, end, _ in passages for i in range(begin, end)}
    pairs = [i for i in range(len(written) - 1) if occurrences(text, written[i : i + 2])]
    assert marked == {i for pair in pairs for i in (pair, pair + 1)}


def test_a_passage_is_as_long_as_it_can_be_and_names_its_place():
    text = list(range(100))
    assert CorpusIndex(text).passages([*range(20, 40), 500, *range(3, 10), *range(60, 68)]) == [
        Passage(0, 20, 20), Passage(28, 36, 60)  # the seven from 3 on are too few
    ]  # fmt: skip


def test_novelty_counts_what_is_written_and_not_the_prompt():
    index = CorpusIndex(range(100))
    assert index.novelty([*range(10), 500, 500], prompt_length=4) == 2 / 8
    assert index.novelty([500] * 4, prompt_length=0) == 1
    assert index.novelty([500] * 4, prompt_length=4) == 0  # nothing was written


@given(ids, ids)
def test_what_follows_the_longest_suffix_is_counted(text, context):
    length, follows = CorpusIndex(text).following(context)
    for n in range(length, len(context) + 1):
        after = [place + n for place in occurrences(text, context[len(context) - n :]) if place + n < len(text)]
        assert Counter(text[place] for place in after) == (follows if n == length else {})


def test_of_a_long_text_the_beginning_is_searched_and_that_is_said(monkeypatch):
    monkeypatch.setattr(corpus_index, "INDEXED_TOKENS", 6)
    index = CorpusIndex.of(Tokens("text", [np.arange(4, dtype=np.uint16), np.arange(4, 10, dtype=np.uint16)], 50257))
    assert (index.ids.tolist(), index.n_text) == ([0, 1, 2, 3, 4, 5], 10)
    assert index.limits == "Only the first 6 of the 10 tokens of the training text are searched"
    assert index.passages([3, 4, 5, 6], at_least=2) == [Passage(0, 3, 3)]
    whole = CorpusIndex.of(Tokens("text", [np.arange(6, dtype=np.uint16)], 50257))
    assert (whole.limits, whole.n_text) == (None, 6)
