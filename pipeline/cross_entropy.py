"""cross_entropy: what the head reads, and the targets -> their loss and its gradients, a few rows of logits at a time.

The logits of a step are its largest tensor by far: V numbers a token. Here they are made, turned into their gradient
and used up chunk by chunk, in the forward pass; all of them together never exist, and the backward pass only scales.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.windows import IGNORED

CHUNK_LOGITS = 2**25  # at a time: 128 MiB of fp32


def cross_entropy_sum(hidden: Tensor, weight: Tensor, last_bias: float, targets: Tensor) -> Tensor:
    """Sum of the targets' losses, 0-D, in nats; softmax in fp32, matrix products in autocast's precision.

    hidden: (N, C); weight: (V, C), whose last row's logit gets `last_bias` more; targets: (N,), left out where IGNORED.
    Equals torch's cross_entropy of all the logits with reduction="sum".
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, last_bias, targets)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, last_bias: float, targets: Tensor) -> Tensor:
        device = hidden.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(precision, torch.float32)
        with torch.autocast(device, enabled=False):
            counts = (targets != IGNORED)[:, None]  # (N, 1)
            labels = targets.clamp(min=0)[:, None]  # (N, 1)
            x, w = hidden.to(precision), weight.to(precision)
            read = x * counts  # what each token adds to the weights' gradient: nothing where IGNORED
            total = torch.zeros((), dtype=exact, device=hidden.device)
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
            n_chunks = -(-len(x) * len(w) // CHUNK_LOGITS)
            n_rows = -(-len(x) // n_chunks)
            for rows in (slice(begin, begin + n_rows) for begin in range(0, len(x), n_rows)):
                logits = (x[rows] @ w.T).to(exact)  # (n, V)
                logits[:, -1] += last_bias
                log_p = logits.log_softmax(dim=-1)
                total -= (log_p.gather(1, labels[rows]) * counts[rows]).sum()
                d_logits = log_p.exp_()  # p, less 1 at the label
                d_logits.scatter_add_(1, labels[rows], d_logits.new_full((1, 1), -1).expand_as(labels[rows]))
                d_logits = d_logits.to(precision)
                d_hidden[rows] = (d_logits @ w) * counts[rows]
                d_weight += d_logits.T @ read[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * gradients[0], d_weight * gradients[0], None, None
