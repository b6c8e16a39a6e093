"""Prompt-lookup decoding: draft the next tokens from the training text, to be verified in one forward pass."""

from collections.abc import Sequence

from pipeline.data.corpus_index import CorpusIndex

# It is faster when the model recites its training text. In fp32, drafts do not change the generated text. In bf16, the
# last bit of a product depends on the number of tokens read at once, and sometimes decides between two tokens of nearly
# equal probability. Sources: Saxena 2023; for speculative decoding, Leviathan et al. 2023.

MAX_DRAFT_TOKENS = 8  # verifying this many tokens takes little longer than generating one
MIN_MATCH_TOKENS = 2  # length of the shortest suffix of the sequence that is looked up in the training text


class PromptLookup:
    """Drafts for one sequence: the tokens that follow its longest suffix in the training text."""

    def __init__(self, corpus: CorpusIndex | None) -> None:
        """Without a `corpus`, every draft is empty."""
        self._corpus, self._n_draft = corpus, MAX_DRAFT_TOKENS

    def draft(self, ids: Sequence[int], limit: int) -> list[int]:
        """At most `limit` ids that may follow `ids`."""
        n = min(self._n_draft, limit)
        if self._corpus is None or n <= 0:
            return []
        _, places = self._corpus.continuations(ids, MIN_MATCH_TOKENS)
        return self._corpus.ids[places[0] : places[0] + n].tolist() if len(places) else []

    def adapt(self, n_accepted: int) -> None:
        """Set the length of the next draft from the number of tokens of the last one that were accepted."""
        self._n_draft = min(2 * n_accepted + 1, MAX_DRAFT_TOKENS)
