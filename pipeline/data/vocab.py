"""Fold the ids that never occur into one row of the embedding: training that is exactly equal, and cheaper.

Rows of the tied embedding whose ids never occur in the training text get their gradient through the softmax alone. If
they start equal, they receive equal gradients and stay equal. So one row represents all U of them: its
logit gets a bias of ln U, which gives it the probability of all of them together; its gradient is divided by U, which
is the gradient of each; and its squared norm counts U times when the gradient is clipped. In exact arithmetic this is
full-vocabulary training; the one difference from stock GPT-2 is that the unused rows start equal.
"""

import math

import numpy as np
import torch
from torch import Tensor


class Vocabulary:
    """Which rows of the embedding the model holds: one for each id that occurs, then one for all others.

    `n_unused` is U, the number of ids behind the last row; 0 where nothing is folded.
    """

    def __init__(self, used: np.ndarray, size: int) -> None:
        """`used`: (K,) ids that have a row of their own, ascending; `size`: ids in the full vocabulary."""
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
        """Fold the ids whose count in the training text is zero or not given; a single one gains nothing and stays."""
        used = np.flatnonzero(counts)
        return cls.full(size) if size - len(used) < 2 else cls(used, size)

    @property
    def unused_bias(self) -> float:
        """ln U, to be added to the logit of the last row."""
        return math.log(self.n_unused) if self.n_unused else 0.0

    def fold(self, ids: Tensor) -> Tensor:
        """Compact ids, which are rows of the embedding, of `ids` of any shape."""
        return self._row_of[ids.long()] if self.n_unused else ids.long()

    def fold_rows(self, full: Tensor) -> Tensor:
        """(size, C) embedding -> (n_rows, C), without its repetitions."""
        if not self.n_unused:
            return full
        first_unused = int((self._row_of == len(self.used)).nonzero()[0])
        return full[torch.cat([self.used, torch.tensor([first_unused])])]

    def unfold_rows(self, folded: Tensor) -> Tensor:
        """(n_rows, C) -> the standard (size, C) embedding."""
        return folded[self._row_of.to(folded.device)] if self.n_unused else folded
