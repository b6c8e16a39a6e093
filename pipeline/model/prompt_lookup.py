"""Prompt-lookup decoding: draft the next tokens from the training text, to be verified in one forward pass."""

from collections.abc import Sequence

from pipeline.data.corpus_index import CorpusIndex

# It is faster when the model recites its training text. In fp32, drafts do not change the generated text. In bf16, the
# last bit of a product depends on the number of tokens read at once, and sometimes decides between two tokens of nearly
# equal probability. Sources: Saxena 2023; for speculative decoding, Leviathan et al. 2023.

MAX_DRAFT_TOKENS = 8  # verifying this many tokens takes little longer than generating one
MIN_MATCH_TOKENS, MAX_MATCH_TOKENS = 2, 16  # lengths of the suffixes of the sequence that are looked up in the text


class PromptLookup:
    """Drafts for one sequence: the tokens that follow its longest suffix in the training text."""

    def __init__(self, corpus: CorpusIndex | None) -> None:
        """Without a `corpus`, every draft is empty."""
        self._corpus, self._n_draft = corpus, MAX_DRAFT_TOKENS
        self._n_ids, self._place = 0, -1  # of the last call: the ids, and the place in the text after them; -1: none

    def draft(self, ids: Sequence[int], limit: int) -> list[int]:
        """At most `limit` ids that may follow `ids`, which are those of the last call and new ones."""
        n = min(self._n_draft, limit)
        if self._corpus is None or n <= 0:
            return []
        text, new = self._corpus.ids, list(ids[self._n_ids :])
        follows = self._place >= 0 and new and text[self._place : self._place + len(new)].tolist() == new
        if follows:  # the passage that was found before: a search takes as long as a small model's step
            self._place += len(new)
        else:
            _, places = self._corpus.continuations(ids[-MAX_MATCH_TOKENS:], MIN_MATCH_TOKENS)
            self._place = int(places[0]) if len(places) else -1
        self._n_ids = len(ids)
        return text[self._place : self._place + n].tolist() if self._place >= 0 else []

    def adapt(self, n_accepted: int) -> None:
        """Set the length of the next draft from the number of tokens of the last one that were accepted."""
        self._n_draft = min(2 * n_accepted + 1, MAX_DRAFT_TOKENS)
