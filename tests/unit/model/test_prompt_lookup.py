"""Drafts from the training text; that they change no text is shown in test_generator."""

from pipeline.data.corpus_index import CorpusIndex
from pipeline.model.prompt_lookup import MAX_DRAFT_TOKENS, PromptLookup


def test_a_draft_is_what_follows_the_longest_suffix_in_the_text():
    lookup = PromptLookup(CorpusIndex([1, 2, 3, 4, 5, 6]))
    assert lookup.draft([9, 2, 3], limit=2) == [4, 5]
    assert lookup.draft([4, 5], limit=8) == [6]
    assert lookup.draft([9, 3], limit=8) == []  # one token alone says too little
    assert lookup.draft([5, 6], limit=8) == []  # the text ends there
    assert lookup.draft([2, 3], limit=0) == PromptLookup(None).draft([2, 3], limit=2) == []


def test_a_passage_that_is_followed_is_not_searched_again(monkeypatch):
    lookup, searched = PromptLookup(corpus := CorpusIndex([7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9])), []
    search = corpus.continuations
    monkeypatch.setattr(corpus, "continuations", lambda *found: (searched.append(found), search(*found))[1])
    assert lookup.draft([1, 2], limit=2) == [3, 4]
    assert lookup.draft([1, 2, 3, 4], limit=2) == [5, 6]
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 8], limit=3) == [9, 9]  # and not 1, which follows the first 7, 8
    assert len(searched) == 1
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], limit=1) == [3]
    assert len(searched) == 2


def test_drafts_are_as_long_as_their_acceptance_makes_worth_it():
    lookup, ids = PromptLookup(CorpusIndex(range(100))), [10, 11]
    assert len(lookup.draft(ids, 50)) == MAX_DRAFT_TOKENS
    lengths = []
    for n_accepted in (0, 1, 3, 8):
        lookup.adapt(n_accepted)
        lengths.append(len(lookup.draft(ids, 50)))
    assert lengths == [1, 3, 7, MAX_DRAFT_TOKENS]
