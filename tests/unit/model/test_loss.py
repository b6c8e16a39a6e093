"""The chunked loss against the plain formula, and what it never holds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.batches import IGNORED
from pipeline.model import loss as cross_entropy
from pipeline.model.loss import cross_entropy_sum

N, C, V = 37, 16, 101


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, C, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[[0, 17, N - 1]] = IGNORED
    return hidden, weight, targets


def plain(hidden, weight, last_bias, targets):
    bias = torch.zeros(V, dtype=weight.dtype)
    bias[-1] = last_bias
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, ignore_index=IGNORED, reduction="sum")


def gradients(function, hidden, weight, last_bias, targets):
    loss = function(hidden, weight, last_bias, targets)
    return loss, *torch.autograd.grad(loss * 3, (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [1, 5, N - 1, N, 1000])
@pytest.mark.parametrize("cached_rows", [2, 1000])
@pytest.mark.parametrize("last_bias", [0.0, math.log(38_551)])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, chunk_rows, cached_rows, last_bias):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_rows * V)
    monkeypatch.setattr(cross_entropy, "CACHED_LOGITS", cached_rows * V)
    hidden, weight, targets = inputs(torch.float32)
    ours = gradients(cross_entropy_sum, hidden, weight, last_bias, targets)
    reference = gradients(plain, hidden, weight, last_bias, targets)
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_gradients_are_those_of_the_loss_in_float64():
    hidden, weight, targets = inputs()
    torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, 2.0, targets), (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [5, N])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_16_bits_lose_no_more_than_autocasts_own_path(monkeypatch, precision, chunk_rows):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_rows * V)
    hidden, weight, targets = inputs(torch.float32)
    exact = gradients(plain, hidden, weight, 0.0, targets)
    with torch.autocast("cpu", precision):
        ours, reference = (gradients(f, hidden, weight, 0.0, targets) for f in (cross_entropy_sum, plain))
    for mine, theirs, true in zip(ours, reference, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm()


def test_small_probabilities_stay_above_zero_in_fp16():
    weight = torch.tensor([[0.0], [-18.0]])  # the second id's p is 1.5e-8, a quarter of fp16's smallest number
    hidden, targets = torch.ones(1, 1, requires_grad=True), torch.tensor([0])
    with torch.autocast("cpu", torch.float16):
        (gradient,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, 0.0, targets), hidden)
    assert gradient.item() == pytest.approx(-18 * math.exp(-18), rel=0.2)


def test_it_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * V)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(max((t.numel() for t in [result] if isinstance(t, torch.Tensor)), default=0))
            return result

    hidden, weight, targets = inputs()
    with Watch():
        cross_entropy_sum(hidden, weight, 0.0, targets).backward()
    assert max(largest) == weight.numel()  # its gradient: more than the five rows, a fraction of N * V
    assert weight.numel() < N * V / 2
