"""The model is GPT-2: its parameter counts, and its logits, are those of the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig
from pipeline.data.batches import IGNORED
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT, SHORT, attend


def shape(**changes):
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50257, "dropout": 0.0}
    return ModelConfig.model_validate({**small, "fold_vocab": False, **changes})


GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}


@pytest.mark.parametrize(("vocab_size", "n_params"), [(50257, 124_439_808), (50304, 124_475_904)])
def test_gpt2_has_exactly_its_published_number_of_parameters(vocab_size, n_params):
    config = shape(**GPT2, vocab_size=vocab_size)
    with torch.device("meta"):
        model = GPT(config, Vocabulary.full(vocab_size))
    assert sum(p.numel() for p in model.parameters()) == config.n_params == n_params


def test_logits_equal_those_of_the_reference_with_the_same_weights():
    transformers = pytest.importorskip("transformers")
    config = shape()
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=50257)
    ).eval()
    model = GPT(config, Vocabulary.full(50257)).eval()
    ours = {}
    for name, value in reference.transformer.state_dict().items():
        is_conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        ours[name] = value.T.contiguous() if is_conv1d else value + 0.01 * torch.randn_like(value)
        if not is_conv1d:
            value.copy_(ours[name])  # biases and LayerNorms away from 0 and 1, so that they count
    model.load_state_dict(ours)
    ids = torch.randint(50257, (3, 16))
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-4


def test_an_untrained_model_knows_nothing():
    model = GPT(shape(), Vocabulary.full(50257)).initialise(seed=1)
    ids = torch.randint(50257, (4, 17))
    assert model.loss(ids[:, :-1], ids[:, 1:], 64).item() == pytest.approx(np.log(50257), abs=0.2)


def test_what_adds_to_the_residual_stream_starts_smaller():
    model = GPT(shape(n_embd=256, n_layer=8), Vocabulary.full(50257)).initialise(seed=1)
    assert model.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.02)  # two adds a layer


def test_no_position_sees_what_comes_after_it():
    model = GPT(shape(), Vocabulary.full(50257)).initialise(seed=1).eval()
    ids = torch.randint(50257, (1, 16))
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 50257
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("length", [7, SHORT, SHORT + 1])
def test_attention_equals_torchs_in_bf16_as_near_as_bf16_allows(length):
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(1, 2, length, 8, generator=generator, requires_grad=True) for _ in range(3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True)
    ours = attend(*rounded, dropout=0.0)
    assert (ours - reference).norm() < 0.01 * reference.norm()
    for mine, true in zip(
        torch.autograd.grad(ours.square().sum(), rounded),
        torch.autograd.grad(reference.square().sum(), exact),
        strict=True,
    ):
        assert (mine - true).norm() < 0.02 * true.norm()


def test_attention_in_bf16_drops_out_as_many_weights_as_asked():
    ones = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)  # all values 1: each output is the sum of what is left
    torch.manual_seed(1)
    dropped = attend(ones, ones, ones, dropout=0.5)
    assert dropped.float().mean().item() == pytest.approx(1, abs=0.1)
    assert dropped.float().std() > 0.1
    assert attend(ones, ones, ones, dropout=0.0).float().std() < 0.01


def test_ignored_targets_count_nowhere():
    model = GPT(shape(), Vocabulary.full(50257)).initialise(seed=1)
    ids = torch.randint(50257, (1, 16))
    targets = ids.roll(-1, dims=1)
    targets[0, 8:] = IGNORED
    with torch.no_grad():
        assert model.loss(ids, targets, 8).item() == pytest.approx(
            model.loss(ids[:, :8], targets[:, :8], 8).item(), rel=1e-6
        )
        assert model.token_losses(ids, targets)[0, 8:].abs().max() == 0


def test_the_losses_of_the_tokens_have_the_loss_of_training_as_their_mean():
    model = GPT(shape(), Vocabulary.full(50257)).initialise(seed=1)
    ids = torch.randint(50257, (2, 17))
    with torch.no_grad():
        losses = model.token_losses(ids[:, :-1], ids[:, 1:])
        assert losses.mean().item() == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:], 32).item(), rel=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    ids = torch.randint(50257, (2, 17))
    gradients = []
    for checkpointing in (False, True):
        model = GPT(shape(), Vocabulary.full(50257), checkpointing).initialise(seed=1).train()
        model.loss(ids[:, :-1], ids[:, 1:], 32).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd 32 is not divisible by n_head 3"):
        shape(n_head=3)


def test_the_committed_recipe_is_a_model(tmp_path):
    assert load_params().section(ModelConfig).n_params > 0
