"""The optimiser Muon: momentum whose updates are orthogonalised."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Polynomials = Sequence[tuple[float, float, float]]

# a x + b x^3 + c x^5, one after the other: the first three of those by Amsel et al. (2025) for singular values in
# [0.001, 1], with their margin of 1% for what bf16 rounds up. From 0.005 on they end between 0.18 and 1.9; lifting the
# small ones pays more than bringing the large ones closer to 1 (benchmarks/LOG.md).
POLYNOMIALS: Polynomials = ((8.2052, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8233, 0.5250))


class Muon(Optimizer):
    """Momentum, with the singular values of its every matrix brought close to 1 (Jordan et al. 2024).

    As torch.optim.Muon, but for how `orthogonalise` does that: the matrices of a group, of one shape, are one batch,
    and a fused matrix, such as that of queries, keys and values, is taken apart into the group's `pieces` of rows.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        precision: torch.dtype,
        polynomials: Polynomials = POLYNOMIALS,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision, self.polynomials = precision, polynomials

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient; `lr` may be a number or a tensor on the device."""
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            for p in matrices:
                self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            pieces = torch.empty(len(matrices), *matrices[0].shape, dtype=self.precision, device=matrices[0].device)
            for p, piece in zip(matrices, pieces, strict=True):  # one by one, as they stay in a CPU's cache
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                piece.copy_(p.grad.lerp(buffer, momentum))  # Nesterov's look ahead
            pieces = pieces.view(len(matrices) * group["pieces"], -1, pieces.shape[2])
            rows, columns = pieces.shape[1:]
            updates = orthogonalise(pieces, self.polynomials)
            updates = updates * (group["lr"] * math.sqrt(max(1, rows / columns)))
            for p, update in zip(matrices, updates.view(len(matrices), -1, columns), strict=True):
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update)


def orthogonalise(x: Tensor, polynomials: Polynomials) -> Tensor:
    """Bring the singular values of each of the matrices (n, rows, columns) close to 1, by odd polynomials of degree 5.

    The first one meets them divided by the fourth root of the sum of their fourth powers: at most 1, and much nearer to
    it than under the Frobenius norm. Each multiplies x by a + b xx' + c (xx')^2. Where one side is twice the other or
    more, up to three are applied to the small xx' alone, and x is multiplied by their product; after more of them, what
    bf16 rounds off would outgrow the rest.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, polynomials).mT
    at_once = 3 if x.shape[2] >= 2 * x.shape[1] else 1
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    scale = None
    for begin in range(0, len(polynomials), at_once):
        gram = x @ x.mT  # (n, rows, rows)
        if scale is None:
            scale = gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # of xx', hence the square of x's
            x, gram = x * scale.rsqrt(), gram / scale
        first, *others = polynomials[begin : begin + at_once]
        product = factor = _even_part(gram, *first)
        for polynomial in others:
            gram = factor @ gram @ factor  # all of them commute
            factor = _even_part(gram, *polynomial)
            product = factor @ product
        x = product @ x
    return x


def _even_part(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result
