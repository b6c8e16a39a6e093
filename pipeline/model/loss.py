"""Cross-entropy of hidden states and its gradients, computed in chunks of logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.data.batches import IGNORED

# The logits are the largest tensor of a step: V numbers per token. The forward pass computes a chunk of them,
# overwrites it with its gradient, adds that to the gradients of hidden states and weights, and frees it. The backward
# pass only scales. The softmax, in fp32, works on parts of a chunk that fit into a CPU's cache.

CHUNK_LOGITS = 2**25  # in a matrix product: 64 MiB of bf16
CACHED_LOGITS = 2**20  # in a softmax on a CPU: 4 MiB of fp32
FP16_SCALE = 2.0**4  # keeps small probabilities above zero in fp16
FP16_TOKENS = 2048  # in a chunk in fp16, at most: keeps the sums over its tokens finite


def cross_entropy_sum(hidden: Tensor, weight: Tensor, last_bias: float, targets: Tensor) -> Tensor:
    """Sum of the targets' losses, 0-D, in nats; softmax in fp32, matrix products in autocast's precision.

    hidden: (N, C); weight: (V, C); `last_bias` is added to the last logit; targets: (N,), left out where IGNORED.
    Equals torch's cross_entropy of all logits with reduction="sum".
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, last_bias, targets)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, last_bias: float, targets: Tensor) -> Tensor:
        device = hidden.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(precision, torch.float32)
        ctx.scale = FP16_SCALE if precision == torch.float16 else 1.0
        with torch.autocast(device, enabled=False):
            counts = (targets != IGNORED)[:, None]  # (N, 1)
            labels = targets.clamp(min=0)[:, None]  # (N, 1)
            x, w = hidden.to(precision), weight.to(precision)
            read = x * counts  # IGNORED tokens add nothing to the weights' gradient
            total = torch.zeros((), dtype=exact, device=hidden.device)
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the weight is not trained
            longest = CHUNK_LOGITS // len(w)
            for chunk in _spans(len(x), longest if ctx.scale == 1 else min(longest, FP16_TOKENS)):
                logits = x[chunk] @ w.T  # (n, V)
                for part in _spans(len(logits), CACHED_LOGITS // len(w) if device == "cpu" else len(logits)):
                    log_p = _to_gradient(logits[part], last_bias, labels[chunk][part], exact, ctx.scale)
                    total -= (log_p * counts[chunk][part]).sum()
                d_hidden[chunk] = (logits @ w) * counts[chunk]
                if d_weight is not None:
                    d_weight += logits.T @ read[chunk]
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        factor = gradients[0] / ctx.scale
        return d_hidden * factor, None if d_weight is None else d_weight * factor, None, None


def _to_gradient(logits: Tensor, last_bias: float, labels: Tensor, exact: torch.dtype, scale: float) -> Tensor:
    """Overwrite logits (n, V) with scale * (p - one_hot(labels)); return the labels' log p in `exact`.

    labels and their log p: (n, 1).
    """
    x = logits.to(exact)
    x[:, -1] += last_bias
    at_label, highest = x.gather(1, labels), x.amax(dim=-1, keepdim=True)
    p = x.softmax(dim=-1)
    log_p = at_label - highest + p.amax(dim=-1, keepdim=True).log()  # the highest p is 1 over the sum of exponentials
    p.scatter_add_(1, labels, p.new_full((1, 1), -1).expand_as(labels))
    logits.copy_(p if scale == 1 else p.mul_(scale))
    return log_p


def _spans(n: int, longest: int) -> list[slice]:
    """Divide range(n) into as few spans as possible, of equal length up to `longest`; the last may be shorter."""
    length = -(-n // -(-n // max(1, longest)))
    return [slice(begin, min(begin + length, n)) for begin in range(0, n, length)]
