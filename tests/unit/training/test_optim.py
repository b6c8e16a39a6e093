"""Optimisers and schedules against the plain formulas."""

import numpy as np
import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig, OptimConfig, steps_in
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig
from pipeline.training.loop import finish_gradients
from pipeline.training.muon import POLYNOMIALS, Muon, orthogonalise
from pipeline.training.optim import SCHEDULES, Schedule, build_optimizers, lr_factor, set_lr

CONVERGENT = (1.875, -1.25, 0.375)  # whose repetition brings every singular value to 1


def config(**changes):
    return load_params().section(OptimConfig).updated(**changes)


def factors(total=100, **changes):
    settings = config(**changes)
    return np.array([lr_factor(step, total, settings) for step in range(1, total + 1)])


@pytest.fixture
def model():
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=50257, dropout=0.0, fold_vocab=False)
    return GPT(shape, Vocabulary.full(50257)).initialise(seed=1)


def test_warmup_rises_in_equal_steps_to_the_peak():
    assert factors(schedule="constant", warmup=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_share_of_the_run_is_as_many_steps_as_it_comes_to():
    assert np.array_equal(factors(schedule="linear", warmup=0.1), factors(schedule="linear", warmup=10))
    assert steps_in(0.02, 528) == 11


def test_linear_falls_in_equal_steps_and_takes_no_step_at_zero():
    assert factors(total=4, schedule="linear", warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "onecycle", "wsd"])
def test_a_fall_ends_at_the_final_share(schedule):
    assert factors(total=1000, schedule=schedule, warmup=0, min_lr_ratio=0.1)[-1] == pytest.approx(0.1, abs=0.005)


def test_cosine_is_half_way_down_in_the_middle():
    curve = factors(total=1001, schedule="cosine", warmup=0, min_lr_ratio=0.2)
    assert curve[500] == pytest.approx(0.6, abs=1e-2)
    assert (np.diff(curve) < 0).all()


def test_onecycle_equals_torch():
    # torch's div_factor 10 starts at a tenth, its final_div_factor 50 ends at a fiftieth of that
    curve = factors(total=200, schedule="onecycle", warmup=20, initial_lr=0.1, min_lr_ratio=0.002)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=202, pct_start=20.5 / 201, div_factor=10, final_div_factor=50
    )
    reference = []
    for _ in range(200):
        optimizer.step()
        scheduler.step()
        reference.append(optimizer.param_groups[0]["lr"])
    assert curve == pytest.approx(np.array(reference), abs=0.04)


def test_wsd_is_flat_until_its_decay():
    curve = factors(schedule="wsd", warmup=10, decay=20)
    assert (curve[9:80] == 1).all()
    assert curve[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "onecycle", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 528])
def test_every_factor_lies_between_zero_and_one(schedule, total):
    curve = factors(total=total, schedule=schedule)
    assert ((curve > 0) & (curve <= 1)).all()


@pytest.mark.parametrize("changes", [{"warmup": 1.5}, {"betas": [0.9, 1.0]}, {"lr": -1}])
def test_what_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=r"share below 1|below 1|greater than 0"):
        config(**changes)


@pytest.mark.parametrize(("changes", "fault"), [
    ({"warmup": 600}, r"optim: warmup 600 and decay 0 take 600 steps, the run has \d+"),
    ({"schedule": "wsd", "warmup": 0.9}, r"optim: warmup 0\.9 and decay 0\.2 take \d+ steps, the run has \d+"),
    ({"name": "lion"}, r"optim.name: unknown value 'lion' \(known: muon, adamw.*\)"),
    ({"schedule": "step"}, r"optim.schedule: unknown value 'step' \(known: constant, linear, cosine, onecycle.*\)"),
])  # fmt: skip
def test_what_the_run_has_no_room_or_no_table_for_is_refused_in_one_line(changes, fault):
    params = load_params()
    params.values["optim"].update(changes)
    with pytest.raises(InputError, match=f"^params.yaml: {fault}$"):
        RunConfig.of(params)


def test_a_schedule_is_added_in_the_table_alone(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "sqrt", Schedule(fall=lambda share: share**0.5, has_plateau=True))
    params = load_params()
    params.values["optim"]["schedule"] = "sqrt"
    RunConfig.of(params)
    curve = factors(schedule="sqrt", warmup=10, decay=20)
    assert (curve[9:80] == 1).all()
    assert (np.diff(curve[80:]) < 0).all()


def test_muon_has_the_blocks_matrices_and_adamw_the_rest(model):
    adamw, muon = build_optimizers(model, config(name="muon"), torch.float32)
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    by_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert by_muon == {id(p) for name, p in model.h.named_parameters() if p.ndim == 2}
    assert by_adamw | by_muon == {id(p) for p in model.parameters()}
    assert not by_adamw & by_muon


def test_only_matrices_decay(model):
    (adamw,) = build_optimizers(model, config(name="adamw", weight_decay=0.1), torch.float32)
    assert {(group["weight_decay"], p.ndim >= 2) for group in adamw.param_groups for p in group["params"]} == {
        (0.1, True),
        (0.0, False),
    }


def test_each_group_follows_its_own_peak(model):
    optimizers = build_optimizers(model, config(name="muon", lr=0.002, muon_lr=0.01), torch.float32)
    set_lr(optimizers, 0.5)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == pytest.approx(
        [0.001] * 2 + [0.005] * 4  # matrices and vectors; the four matrices of a block
    )


def one_by_one(x, polynomials):
    """The same in the plain order, on one matrix."""
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


def test_the_polynomials_bring_singular_values_between_a_fifth_and_two():
    s = torch.logspace(0, -2.3, 1000)  # down to 0.005
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.18
    assert s.max() < 1.9


@pytest.mark.parametrize("shape", [(64, 256), (64, 64)])
def test_orthogonalising_in_bf16_is_as_near_to_the_truth_as_the_plain_order(shape):
    generator = torch.Generator().manual_seed(1)  # a gradient of few directions is the hard case
    few = torch.randn(2, shape[0], 4, generator=generator) @ torch.randn(2, 4, shape[1], generator=generator)
    batch = few + 1e-3 * torch.randn(few.shape, generator=generator)
    for mine, x in zip(orthogonalise(batch.bfloat16(), POLYNOMIALS), batch, strict=True):
        true, theirs = one_by_one(x.double(), POLYNOMIALS), one_by_one(x.bfloat16(), POLYNOMIALS)
        assert (mine - true).norm() < 1.1 * (theirs - true).norm()


def test_only_the_fused_matrix_is_taken_apart(model):
    _, muon = build_optimizers(model, config(name="muon"), torch.float32)
    assert {tuple(group["params"][0].shape): group["pieces"] for group in muon.param_groups} == {
        (48, 16): 3, (16, 16): 1, (64, 16): 1, (16, 64): 1,
    }  # fmt: skip


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"])  # square, tall, wide
def test_muon_equals_torch_on_every_shape(model, name, lr):
    ours = model.h[0].get_submodule(name).weight
    theirs = torch.nn.Parameter(before := ours.detach().clone())
    ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    theirs.grad, before = ours.grad.clone(), before.clone()
    Muon([{"params": [ours], "pieces": 1}], lr, 0.95, 0.0, torch.bfloat16, [CONVERGENT] * 20).step()
    torch.optim.Muon([theirs], 0.02, 0.0, 0.95, ns_coefficients=CONVERGENT, ns_steps=20).step()
    assert (ours - theirs).norm() < 0.05 * (theirs - before).norm()  # both in bf16, up to convergence


@pytest.mark.parametrize("weight_decay", [0.0, 10.0])
def test_muon_equals_torch_with_queries_keys_and_values_apart(model, weight_decay):
    ours = Muon(
        [{"params": [block.attn.c_attn.weight for block in model.h], "pieces": 3}], 0.02, 0.9, weight_decay,
        torch.bfloat16, [CONVERGENT] * 20,
    )  # fmt: skip
    (whole,) = ours.param_groups[0]["params"]
    apart = [torch.nn.Parameter(piece.clone()) for piece in whole.detach().chunk(3)]
    torchs = torch.optim.Muon(apart, 0.02, weight_decay, 0.9, ns_coefficients=CONVERGENT, ns_steps=20)
    generator, before = torch.Generator().manual_seed(1), whole.detach().clone()
    for _ in range(3):
        whole.grad = torch.randn(whole.shape, generator=generator)
        for piece, gradient in zip(apart, whole.grad.clone().chunk(3), strict=True):
            piece.grad = gradient
        ours.step()
        torchs.step()
    moved = torch.cat(list(apart)) - before
    assert ((whole - before) - moved).norm() / moved.norm() < 0.05  # both in bf16, up to convergence


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
