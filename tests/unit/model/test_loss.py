"""The chunked loss equals the plain formula, and never holds all logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.batches import IGNORED
from pipeline.model import loss as loss_module
from pipeline.model.loss import cross_entropy_sum

N, C, V = 37, 16, 101


def inputs(dtype=torch.float32):
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


def loss_and_gradients(function, hidden, weight, last_bias, targets):
    loss = function(hidden, weight, last_bias, targets)
    return loss, *torch.autograd.grad(loss * 3, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [1, 5, N - 1, N, 1000])
@pytest.mark.parametrize("cached_tokens", [2, 1000])
@pytest.mark.parametrize("last_bias", [0.0, math.log(38_551)])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, chunk_tokens, cached_tokens, last_bias):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_tokens * V)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", cached_tokens * V)
    hidden, weight, targets = inputs()
    found = loss_and_gradients(cross_entropy_sum, hidden, weight, last_bias, targets)
    expected = loss_and_gradients(plain, hidden, weight, last_bias, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [5, N])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_16_bits_lose_no_more_than_under_autocast(monkeypatch, precision, chunk_tokens):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_tokens * V)
    hidden, weight, targets = inputs()
    exact = loss_and_gradients(plain, hidden, weight, 0.0, targets)
    with torch.autocast("cpu", precision):
        ours, torchs = (loss_and_gradients(f, hidden, weight, 0.0, targets) for f in (cross_entropy_sum, plain))
    for found, reference, expected in zip(ours, torchs, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1.1 * (reference - expected).norm()


def test_small_probabilities_remain_above_zero_in_fp16():
    weight = torch.tensor([[0.0], [-18.0]])  # the second id's p is 1.5e-8, a quarter of fp16's smallest number
    hidden, targets = torch.ones(1, 1, requires_grad=True), torch.tensor([0])
    with torch.autocast("cpu", torch.float16):
        (gradient,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, 0.0, targets), hidden)
    assert gradient.item() == pytest.approx(-18 * math.exp(-18), rel=0.2)


def test_the_gradient_of_a_small_vocabulary_stays_finite_in_fp16():
    n = 2**14  # tokens; their sum is -n / 2, times FP16_SCALE twice the largest number of fp16
    hidden, weight = torch.ones(n, 2), torch.zeros(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy_sum(hidden, weight, 0.0, torch.zeros(n, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.tolist() == [[-n / 2] * 2, [n / 2] * 2]


def test_it_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * V)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    hidden, weight, targets = inputs(torch.float64)
    with Watch():
        cross_entropy_sum(hidden, weight, 0.0, targets).backward()
    assert max(sizes) == weight.numel()  # its gradient: more than the five tokens' logits, a fraction of N * V
    assert weight.numel() < N * V / 2
