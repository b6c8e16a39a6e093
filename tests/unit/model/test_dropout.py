"""Dropout on a CPU: how many elements it drops, which, and what it multiplies the others by."""

import pytest
import torch

from pipeline.model.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_p_is_dropped_and_the_mean_stays(dtype, p):
    torch.manual_seed(1)
    x = torch.ones(2**20 + 1, dtype=dtype, requires_grad=True)  # not a multiple of the elements of a random number
    dropped = dropout(x, p)
    share, spread = (dropped == 0).double().mean().item(), (p * (1 - p) / x.numel()) ** 0.5
    assert share == pytest.approx(p, abs=5 * spread)
    assert set(dropped.unique().tolist()) == {0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    dropped.backward(torch.full_like(x, 2))
    assert torch.equal(x.grad, 2 * dropped)


def test_elements_are_dropped_independently():
    torch.manual_seed(1)
    kept = dropout(torch.ones(2**20, dtype=torch.bfloat16), 0.5).double() - 1  # -1 or 1
    for distance in range(1, 9):  # also of one random number
        assert abs((kept[distance:] * kept[:-distance]).mean()) < 5 * 2**-10
    for lane in range(4):
        assert abs(kept[lane::4].mean()) < 5 * 2**-9


def test_the_state_of_torchs_generator_decides_what_is_dropped():
    x = torch.ones(7, 5, 3)
    first, second = [(torch.manual_seed(3), dropout(x, 0.3), dropout(x, 0.3))[1:] for _ in range(2)]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


def test_nothing_is_dropped_without_training_or_with_p_0():
    x = torch.ones(3)
    state = torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)
