"""Prompt-lookup decoding: draft the next tokens from the training text, to be verified in one forward pass.

Faster where the model recites. In fp32 the text is the same with and without drafts. In bf16 the last bit of a product
depends on how many tokens are read at once, and now and then decides between two tokens of all but equal probability.
Source: Saxena 2023; for speculative decoding, Leviathan et al. 2023.
"""

from collections.abc import Sequence

from pipeline.data.corpus_index import CorpusIndex

MOST_DRAFT_TOKENS = 8  # to verify so many takes little longer than to compute one
LEAST_CONTEXT = 2  # tokens that the text must have in common with the sequence


class PromptLookup:
    """Drafts for one sequence: how the training text continues after the longest suffix that it has in common."""

    def __init__(self, corpus: CorpusIndex | None) -> None:
        """No `corpus`: no drafts."""
        self._corpus, self._n_draft = corpus, MOST_DRAFT_TOKENS

    def draft(self, ids: Sequence[int], room: int) -> list[int]:
        """Up to `room` ids that may follow `ids`."""
        n = min(self._n_draft, room)
        if self._corpus is None or n <= 0:
            return []
        _, places = self._corpus.continuations(ids, LEAST_CONTEXT)
        return self._corpus.ids[places[0] : places[0] + n].tolist() if len(places) else []

    def adapt(self, n_accepted: int) -> None:
        """Draft as many tokens next as the acceptance of the last draft makes worth verifying."""
        self._n_draft = min(2 * n_accepted + 1, MOST_DRAFT_TOKENS)
