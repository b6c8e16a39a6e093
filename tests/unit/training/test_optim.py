"""Optimisers and learning-rate schedules against formulas and against torch."""

import numpy as np
import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig, OptimConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig
from pipeline.training.loop import finish_gradients
from pipeline.training.muon import POLYNOMIALS, Muon, _symmetric_product, orthogonalise
from pipeline.training.optim import SCHEDULES, build_optimizers, lr_factor, set_lr

CONVERGENT = (1.875, -1.25, 0.375)  # applied repeatedly, it moves every singular value to 1


def config(**changes):
    return load_params().section(OptimConfig).updated(**changes)


def factors(total=100, **changes):
    settings = config(**changes)
    return np.array([lr_factor(step, total, settings) for step in range(1, total + 1)])


@pytest.fixture
def model():
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=50257, dropout=0.0, fold_vocab=False)
    return GPT(shape, Vocabulary.full(50257)).initialise(seed=1)


@pytest.mark.parametrize(
    ("total", "changes", "expected"),
    [
        (100, {"schedule": "constant", "warmup": 4}, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1, 5: 1, 100: 1}),
        (4, {"schedule": "linear", "warmup": 0}, {1: 1, 2: 0.75, 3: 0.5, 4: 0.25}),  # there is no step at zero
        (1001, {"schedule": "cosine", "warmup": 0, "min_lr_ratio": 0.2}, {1: 1, 501: 0.6, 1001: 0.2}),
        (100, {"schedule": "wsd", "warmup": 10, "decay": 20}, {9: 0.9, 10: 1, 80: 1, 81: 1, 82: 0.95, 100: 0.05}),
        (
            100,
            {"schedule": "onecycle", "warmup": 20, "initial_lr": 0.1, "min_lr_ratio": 0.02},
            {10: 0.55, 20: 1, 21: 1, 61: 0.51, 100: 0.02},
        ),
        (100, {"schedule": "linear", "warmup": 0.1}, {5: 0.5, 10: 1, 11: 1, 56: 0.5}),  # a tenth of the run
    ],
)
def test_a_schedule_has_the_factors_of_its_formula(total, changes, expected):
    curve = factors(total, **changes)
    assert {step: curve[step - 1] for step in expected} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_factor_is_above_0_and_at_most_1_also_in_a_run_of_one_step(schedule):
    for total in (1, 2, 528):
        curve = factors(total, schedule=schedule)
        assert ((curve > 0) & (curve <= 1)).all()


@pytest.mark.parametrize("changes", [{"warmup": 1.5}, {"betas": [0.9, 1.0]}, {"lr": -1}])
def test_an_invalid_value_is_refused(changes):
    with pytest.raises(ValueError, match=r"share below 1|below 1|greater than 0"):
        config(**changes)


@pytest.mark.parametrize(("changes", "fault"), [
    ({"schedule": "wsd", "warmup": 0.9}, r"optim: warmup 0\.9 and decay 0\.2 are 1\.1 of the run"),
    ({"name": "lion"}, r"optim.name: unknown value 'lion' \(known: muon, adamw.*\)"),
    ({"schedule": "step"}, r"optim.schedule: unknown value 'step' \(known: constant, linear, cosine, onecycle.*\)"),
])  # fmt: skip
def test_a_schedule_longer_than_the_run_and_an_unknown_name_are_refused_in_one_line(changes, fault):
    params = load_params()
    params.values["optim"].update(changes)
    with pytest.raises(InputError, match=f"^params.yaml: {fault}$"):
        RunConfig.of(params)


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest_at_their_own_peaks(model):
    optim = config(name="muon", lr=0.002, muon_lr=0.01, weight_decay=0.1)
    optimizers = build_optimizers(model, optim, torch.float32)
    set_lr(optimizers, 0.5)
    by_adamw, by_muon = ([(p, group) for group in each.param_groups for p in group["params"]] for each in optimizers)
    assert {id(p) for p, _ in by_muon} == {id(p) for p in model.h.parameters() if p.ndim == 2}
    assert {id(p) for p, _ in by_adamw + by_muon} == {id(p) for p in model.parameters()}
    assert len(by_adamw + by_muon) == len(list(model.parameters()))
    assert {group["lr"] for _, group in by_adamw} == {0.001}
    assert {group["lr"] for _, group in by_muon} == {0.005}
    assert {(p.ndim, group["weight_decay"]) for p, group in by_adamw} == {(2, 0.1), (1, 0.0)}
    assert [tuple(p.shape) for p, group in by_muon if group["pieces"] == 3] == [(48, 16)]  # queries, keys and values


def one_by_one(x, polynomials):
    """`orthogonalise` for one matrix, without the products of polynomials."""
    x = x / x.norm()
    x = x / torch.linalg.matrix_norm(x @ x.T) ** 0.5
    for a, b, c in polynomials:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("n_polynomials", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(6, 6), (6, 24), (24, 6), (6, 8)])
def test_orthogonalising_a_batch_applies_the_polynomials_to_the_singular_values(shape, n_polynomials):
    batch = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    polynomials = (
        [POLYNOMIALS[k % 3] for k in range(n_polynomials)] if n_polynomials < 4 else [CONVERGENT] * n_polynomials
    )
    for ours, x in zip(orthogonalise(batch, polynomials), batch, strict=True):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s = s / (s**4).sum() ** 0.25
        for a, b, c in polynomials:
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(ours, u * s @ vt)


@pytest.mark.parametrize("rows", [1, 3, 8, 30])  # fewer than strips, a whole number of strips, a shorter last strip
def test_a_symmetric_product_in_strips_equals_the_plain_formula(rows):
    x = torch.randn(2, rows, 5, generator=torch.Generator().manual_seed(1))
    gram = x @ x.mT
    torch.testing.assert_close(_symmetric_product(x, x.mT), gram)
    found = _symmetric_product(gram, gram, gram, 0.5, -2.0)
    torch.testing.assert_close(found, 0.5 * gram - 2 * gram @ gram)


@pytest.mark.parametrize("shape", [(64, 256), (64, 64)])
def test_orthogonalising_in_bf16_is_as_accurate_as_one_polynomial_after_the_other(shape):
    generator = torch.Generator().manual_seed(1)  # a gradient of low rank is the hard case
    few = torch.randn(2, shape[0], 4, generator=generator) @ torch.randn(2, 4, shape[1], generator=generator)
    batch = few + 1e-3 * torch.randn(few.shape, generator=generator)
    for mine, x in zip(orthogonalise(batch.bfloat16(), POLYNOMIALS), batch, strict=True):
        exact, plain = one_by_one(x.double(), POLYNOMIALS), one_by_one(x.bfloat16(), POLYNOMIALS)
        assert (mine - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("name", "pieces", "lr", "weight_decay"),
    [
        ("attn.c_proj", 1, 0.02, 0.0),  # square
        ("mlp.c_fc", 1, torch.tensor(0.02), 10.0),  # tall
        ("mlp.c_proj", 1, 0.02, 10.0),  # wide
        ("attn.c_attn", 3, 0.02, 10.0),  # queries, keys and values
    ],
)
def test_muon_equals_torch_on_every_shape(model, name, pieces, lr, weight_decay):
    ours = model.h[0].get_submodule(name).weight
    theirs = [torch.nn.Parameter(piece.clone()) for piece in ours.detach().chunk(pieces)]
    muon = Muon([{"params": [ours], "pieces": pieces}], lr, 0.9, weight_decay, torch.bfloat16, [CONVERGENT] * 20)
    torchs = torch.optim.Muon(theirs, 0.02, weight_decay, 0.9, ns_coefficients=CONVERGENT, ns_steps=20)
    generator, before = torch.Generator().manual_seed(1), ours.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(ours.shape, generator=generator)
        for piece, gradient in zip(theirs, ours.grad.clone().chunk(pieces), strict=True):
            piece.grad = gradient
        muon.step()
        torchs.step()
    moved = torch.cat(theirs) - before
    assert ((ours - before) - moved).norm() / moved.norm() < 0.05  # both in bf16, to convergence


def test_adamw_has_the_bits_and_the_state_of_torchs(model):
    parameters = [*model.parameters()]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    generator = torch.Generator().manual_seed(1)
    changes = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.99], "eps": 1e-6}
    (ours,) = build_optimizers(model, config(**changes), torch.float32)
    groups = [
        {"params": [p for p in theirs if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), eps=1e-6, fused=True)
    for step in range(4):
        for optimizer in (ours, torchs):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
        for p, twin in zip(parameters[step % 2 :], theirs[step % 2 :], strict=True):  # one has no gradient in two steps
            p.grad = torch.randn(p.shape, generator=generator)
            twin.grad = p.grad.clone()
        for optimizer in (ours, torchs):
            optimizer.step()
        assert all(torch.equal(p, twin) for p, twin in zip(parameters, theirs, strict=True))
    for p, twin in zip(parameters, theirs, strict=True):
        assert ours.state[p].keys() == torchs.state[twin].keys()
        assert all(torch.equal(value, torchs.state[twin][key]) for key, value in ours.state[p].items())


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])  # no clipping, a norm above, a norm below
def test_clipping_equals_torch(model, clip):
    ids = torch.randint(50257, (2, 9), generator=torch.Generator().manual_seed(1))
    model.loss(ids[:, :-1], ids[:, 1:], 16).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = finish_gradients(model, clip)
    ours = [p.grad.clone() for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    reference = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    assert norm.item() == pytest.approx(reference.item(), rel=1e-6)
    assert all(torch.allclose(a, p.grad) for a, p in zip(ours, model.parameters(), strict=True))
