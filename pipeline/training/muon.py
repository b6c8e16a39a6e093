"""The optimiser Muon: SGD with momentum and orthogonalised updates."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.training.optimizer import Optimizer

Polynomials = Sequence[tuple[float, float, float]]

# Coefficients (a, b, c) of a x + b x^3 + c x^5, applied in this order: the first three polynomials of Amsel et al.
# (2025) for singular values in [0.001, 1], with their safety margin of 1% for rounding in bf16. They map singular
# values of at least 0.005 to between 0.18 and 1.9. Raising small values matters more than moving large ones closer to
# 1 (benchmarks/LOG.md).
POLYNOMIALS: Polynomials = ((8.2052, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8233, 0.5250))

STRIPS = 4  # of a symmetric product


class Muon(Optimizer):
    """SGD with momentum; the singular values of each update are moved close to 1 (Jordan et al. 2024).

    It differs from torch.optim.Muon in `orthogonalise`. All matrices of a group have the same shape and are processed
    as one batch. A fused matrix, such as that of queries, keys and values, is split into the group's `pieces` of rows.
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
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.precision, self.polynomials = precision, polynomials

    @torch.no_grad()
    def step(self) -> None:
        """Update each matrix from its gradient; `lr` may be a number or a tensor on the device."""
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            for p in matrices:
                self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            pieces = torch.empty(len(matrices), *matrices[0].shape, dtype=self.precision, device=matrices[0].device)
            for p, piece in zip(matrices, pieces, strict=True):  # one by one: each fits into the CPU's cache
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                piece.copy_(p.grad.lerp(buffer, momentum))  # Nesterov momentum
            pieces = pieces.view(len(matrices) * group["pieces"], -1, pieces.shape[2])
            rows, columns = pieces.shape[1:]
            updates = orthogonalise(pieces, self.polynomials)
            updates.mul_(group["lr"] * math.sqrt(max(1, rows / columns)))
            for p, update in zip(matrices, updates.view(len(matrices), -1, columns), strict=True):
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update.contiguous())  # a tall matrix is transposed: copying it first takes half the time


def orthogonalise(x: Tensor, polynomials: Polynomials) -> Tensor:
    """Move the singular values of each matrix in x (n, rows, columns) close to 1, by odd polynomials of degree 5.

    First x is divided by (sum of s^4)^(1/4) over its singular values s. The largest is then at most 1, and much closer
    to 1 than after a division by the Frobenius norm. Each polynomial multiplies x by a + b xx' + c (xx')^2. If one side
    is at least twice the other, up to three polynomials are evaluated on the smaller matrix xx' and x is multiplied by
    their product. With more than three, rounding errors in bf16 would dominate.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, polynomials).mT
    at_once = 3 if x.shape[2] >= 2 * x.shape[1] else 1
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    scale = None
    for begin in range(0, len(polynomials), at_once):
        gram = _symmetric_product(x, x.mT)  # (n, rows, rows)
        if scale is None:
            scale = gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the square of x's divisor
            x, gram = x.mul_(scale.rsqrt()), gram.div_(scale)
        first, *others = polynomials[begin : begin + at_once]
        product = factor = _even_part(gram, *first)
        for polynomial in others:
            gram = _symmetric_product(_symmetric_product(factor, gram), factor)  # all factors commute
            factor = _even_part(gram, *polynomial)
            product = _symmetric_product(factor, product)
        x = product @ x
    return x


def _even_part(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    result = _symmetric_product(gram, gram, gram, b, c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result


def _symmetric_product(
    x: Tensor, y: Tensor, addend: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """x @ y, or beta * addend + alpha * x @ y, whose result (n, rows, rows) is symmetric.

    In fp32 on a CPU only the blocks up to the diagonal are computed, in STRIPS strips of rows; the others are copied.
    Four strips need 10/16 of the multiplications.
    """
    if x.element_size() < 4 or x.device.type != "cpu":
        return x @ y if addend is None else torch.baddbmm(addend, x, y, beta=beta, alpha=alpha)
    n, rows = x.shape[:2]
    result = x.new_empty(n, rows, rows)
    height = -(-rows // STRIPS)
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        strip = x[:, begin:end] @ y[:, :, :end]  # (n, height, end)
        if addend is not None:
            strip.mul_(alpha).add_(addend[:, begin:end, :end], alpha=beta)
        result[:, begin:end, :end] = strip
        result[:, :begin, begin:end] = strip[:, :, :begin].mT
    return result
