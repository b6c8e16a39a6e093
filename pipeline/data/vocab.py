"""Represent all ids that never occur in the training text by one row of the embedding.

Rows of the tied embedding whose ids never occur get their gradient only through the softmax. If they start equal, they
get equal gradients and stay equal. So one row w represents all U of them:

    logit:     h w + ln U         the probability of all U together
    gradient:  dL/dw / U          the gradient of each of them
    norm:      U |dL/dw / U|^2    their share of the squared norm that clipping uses

In exact arithmetic this equals training with the full vocabulary. The only difference from stock GPT-2 is that the
unused rows start equal.
"""

import math

import numpy as np
import torch
from torch import Tensor


class Vocabulary:
    """Map token ids to rows of the embedding: a row for each id that occurs, then one row for all others.

    `n_unused` is U, the number of ids that the last row represents; 0 if nothing is folded.
    """

    def __init__(self, used: np.ndarray, size: int) -> None:
        """`used`: (K,) ids with a row of their own, ascending; `size`: number of ids in the full vocabulary."""
        self.size, self.n_unused = size, size - len(used)
        self.used = torch.from_numpy(used.astype(np.int64))  # (K,)
        self.n_rows = len(used) + (self.n_unused > 0)
        self._row_of = torch.full((size,), len(used), dtype=torch.int64)  # (size,)
        self._row_of[self.used] = torch.arange(len(used))

    @classmethod
    def full(cls, size: int) -> "Vocabulary":
        """A row for every id."""
        return cls(np.arange(size), size)

    @classmethod
    def of(cls, counts: np.ndarray, size: int) -> "Vocabulary":
        """Fold the ids whose count is zero or missing, unless there is only one such id."""
        used = np.flatnonzero(counts)
        return cls.full(size) if size - len(used) < 2 else cls(used, size)

    @property
    def unused_bias(self) -> float:
        """ln U, the bias of the last row's logit."""
        return math.log(self.n_unused) if self.n_unused else 0.0

    def fold(self, ids: Tensor) -> Tensor:
        """Convert `ids`, of any shape, to compact ids, which are rows of the embedding."""
        return self._row_of[ids.long()] if self.n_unused else ids.long()

    def fold_rows(self, full: Tensor) -> Tensor:
        """Convert the standard embedding, (size, C), to the folded one, (n_rows, C)."""
        if not self.n_unused:
            return full
        first_unused = int((self._row_of == len(self.used)).nonzero()[0])
        return full[torch.cat([self.used, torch.tensor([first_unused])])]

    def unfold_rows(self, folded: Tensor) -> Tensor:
        """Convert the folded embedding, (n_rows, C), to the standard one, (size, C)."""
        return folded[self._row_of.to(folded.device)] if self.n_unused else folded
