"""Sampling parameters are validated, and each has its effect on the distribution of the samples."""

import math

import pytest
import torch

from pipeline.model.sampling import Sampling, sample
from pipeline.system.errors import InputError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])  # probabilities .644, .237, .087, .032, 0
N = 2000  # samples, whose shares have a standard deviation of at most 0.011


def shares(used=(), **values):
    """How often each compact id is sampled."""
    sampling, generator = Sampling.of(**{"temperature": 1, **values}), torch.Generator().manual_seed(1)
    found = torch.tensor([sample(LOGITS, sampling, used, generator) for _ in range(N)])
    return torch.bincount(found, minlength=len(LOGITS)) / N


DISTRIBUTIONS = [
    ({"temperature": 1}, LOGITS.softmax(0)),
    ({"temperature": 0}, [1, 0, 0, 0, 0]),
    *(({"temperature": tiny}, [1, 0, 0, 0, 0]) for tiny in (1e-300, 5e-324)),
    ({"repetition_penalty": 0.1, "used": [0]}, [1, 0, 0, 0, 0]),
    ({"temperature": 100}, [0.25, 0.25, 0.25, 0.25, 0]),
    ({"repetition_penalty": 2, "used": [0, 0, 3]}, torch.tensor([1.0, 1, 0, -2, -torch.inf]).softmax(0)),
]


@pytest.mark.parametrize(("values", "expected"), DISTRIBUTIONS)
def test_temperature_and_penalty_have_the_distribution_of_their_formulas(values, expected):
    logits = LOGITS.clone()
    assert torch.allclose(shares(**values), torch.as_tensor(expected).float(), atol=0.04)  # 4 standard deviations
    assert torch.equal(LOGITS, logits)  # the caller's are unchanged


TOP_K = [({"top_k": k, "temperature": 10}, n) for k, n in ((1, 1), (2, 2), (4, 4), (5, 4), (0, 4), (50_257, 4))]
TOP_P = [({"top_p": p}, n) for p, n in ((5e-324, 1), (1e-9, 1), (0.64, 1), (0.65, 2), (0.88, 2), (0.89, 3), (1, 4))]
BOTH = [({"top_k": 2, "top_p": 0.72}, 1)]  # of the two, .731 and .269


@pytest.mark.parametrize(("values", "possible"), [*TOP_K, *TOP_P, *BOTH])
def test_top_k_and_top_p_leave_the_most_likely_tokens(values, possible):
    assert (shares(**values) > 0).tolist() == [True] * possible + [False] * (5 - possible)


def test_every_invalid_value_is_refused_by_name_in_one_line():  # E3
    for name in set(Sampling.model_fields) - {"stop"}:
        for value in (-1, 1e30, math.nan, math.inf, None, "many", "", [], {}):
            with pytest.raises(InputError, match=f"^{name} .*$"):
                Sampling.of(**{name: value})
    with pytest.raises(InputError, match=r"^repetition_penalty 5e-324: .* 0\.1$"):  # 0 as fp32, which makes NaN
        Sampling.of(repetition_penalty=5e-324)
    with pytest.raises(InputError, match=r"^stop .* at most 1000 characters$"):
        Sampling.of(stop=["a" * 1001])
    with pytest.raises(InputError) as refused:
        Sampling.of(max_tokens=3.7, top_k=10**9, seed="x" * 1000, colour="red")
    assert all(name in str(refused.value) for name in ("max_tokens 3.7", "top_k 1000000000", "seed 'xxx", "colour"))
    assert len(str(refused.value)) < 500


def test_whole_numbers_may_be_floats_or_text():
    assert Sampling.of(max_tokens=40.0, seed="7") == Sampling(max_tokens=40, seed=7)
