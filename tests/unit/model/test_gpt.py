"""The network; tests/integration/test_export.py compares its logits with the reference implementation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config.sections import ModelConfig
from pipeline.data.batches import IGNORED
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT, SHORT, attend, gelu
from tests.mps import MPS, mps  # noqa: F401 (a fixture)

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=False)
VOCABULARY = Vocabulary.full(50257)
IDS = torch.randint(50257, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return GPT(SHAPE, VOCABULARY).initialise(seed=1).eval()


def test_the_number_of_weights_and_their_initial_values(model):
    with torch.no_grad():
        assert model.loss(IDS[:, :-1], IDS[:, 1:], 48).item() == pytest.approx(np.log(50257), abs=0.2)
    wide = GPT(SHAPE.updated(n_embd=256, n_layer=8, vocab_size=9), Vocabulary.full(9)).initialise(seed=1)
    for each in (model, wide):
        assert sum(parameter.numel() for parameter in each.parameters()) == each.config.n_params
    mlp, n_additions = wide.h[0].mlp, 16  # to the residual stream: two in each block
    assert mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mlp.c_proj.weight.std().item() == pytest.approx(0.02 / n_additions**0.5, rel=0.02)


@pytest.mark.parametrize("length", [7, SHORT, SHORT + 1])
def test_attention_in_bf16_equals_torchs_in_fp32_as_closely_as_bf16_allows(length):
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(1, 2, length, 8, generator=generator, requires_grad=True) for _ in range(3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True)
    ours = attend(*rounded, p=0.0)
    assert (ours - reference).norm() < 0.01 * reference.norm()
    gradients = torch.autograd.grad(ours.square().sum(), rounded)
    for found, expected in zip(gradients, torch.autograd.grad(reference.square().sum(), exact), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_attention_in_bf16_has_the_dropout_that_was_set():
    ones = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)  # all values are 1: an output is the sum of the weights left
    torch.manual_seed(1)
    dropped = attend(ones, ones, ones, p=0.5)
    assert dropped.float().mean().item() == pytest.approx(1, abs=0.1)
    assert dropped.float().std() > 0.1
    assert attend(ones, ones, ones, p=0.0).float().std() < 0.01


def test_gelu_and_its_gradient_equal_torchs():
    x = torch.linspace(-12, 12, 2001, requires_grad=True)
    assert not torch.equal(gelu(x), F.gelu(x, approximate="tanh"))  # another formula
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(gelu(x).double(), expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.square().sum(), z)[0].double() for y, z in ((gelu(x), x), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=2e-6, atol=2e-6)


def test_the_loss_is_the_mean_of_the_token_losses_without_ignored_targets(model):
    inputs, targets = IDS[:, :-1], IDS[:, 1:].clone()
    targets[:, 8:] = IGNORED
    with torch.no_grad():
        losses, loss = model.token_losses(inputs, targets), model.loss(inputs, targets, 24).item()
        assert loss == pytest.approx(losses[:, :8].mean().item(), rel=1e-6)
        assert loss == pytest.approx(model.loss(inputs[:, :8], targets[:, :8], 24).item(), rel=1e-6)
    assert losses[:, 8:].abs().max() == 0


@pytest.mark.parametrize("device", [torch.device("cpu"), MPS])
def test_gradient_checkpointing_changes_no_gradient(device, mps):  # noqa: F811
    """Dropout is the same in the recomputation."""
    gradients, ids = [], IDS.to(device)
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = GPT(SHAPE.updated(dropout=0.1), VOCABULARY, checkpointing).initialise(seed=1).train().to(device)
        model.loss(ids[:, :-1], ids[:, 1:], 48).backward()
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
