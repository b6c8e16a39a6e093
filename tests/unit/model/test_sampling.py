"""Sampling: values checked in words, and a sample that does what its settings say."""

import math

import pytest
import torch

from pipeline.model.sampling import Sampling, sample
from pipeline.system.errors import InputError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])


def sampled(n=2000, logits=LOGITS, seen=(), **values):
    """How often each row is sampled."""
    sampling, generator = Sampling.of(**values), torch.Generator().manual_seed(1)
    rows = torch.tensor([sample(logits, sampling, seen, generator) for _ in range(n)])
    return torch.bincount(rows, minlength=len(logits)) / n


def test_temperature_one_samples_by_the_probabilities():
    assert torch.allclose(
        sampled(temperature=1), LOGITS.softmax(0), atol=0.04
    )  # 4 standard deviations of 2,000 samples


def test_temperature_zero_takes_the_likeliest_and_so_does_one_that_is_nearly_zero():
    for temperature in (0, 1e-300):
        assert sampled(50, temperature=temperature)[0] == 1


def test_a_high_temperature_levels_what_can_be_sampled_and_samples_nothing_impossible():
    assert torch.allclose(sampled(temperature=100), torch.tensor([0.25, 0.25, 0.25, 0.25, 0]), atol=0.04)


@pytest.mark.parametrize(("top_k", "possible"), [(1, 1), (2, 2), (4, 4), (5, 4), (0, 4), (50_257, 4)])
def test_top_k_leaves_the_likeliest(top_k, possible):
    assert (sampled(temperature=10, top_k=top_k) > 0).sum() == possible


@pytest.mark.parametrize(("top_p", "possible"), [(1e-9, 1), (0.64, 1), (0.65, 2), (0.88, 2), (0.89, 3), (1, 4)])
def test_top_p_leaves_the_fewest_that_have_the_probability_together(top_p, possible):
    assert (sampled(temperature=1, top_p=top_p) > 0).sum() == possible  # the shares are .644, .237, .087, .032


def test_top_p_counts_the_shares_of_what_top_k_leaves():
    assert (sampled(temperature=1, top_k=2, top_p=0.72) > 0).sum() == 1  # of the two, .731 and .269


def test_the_penalty_makes_what_stands_there_less_likely_whatever_its_sign():
    odds = sampled(temperature=1, repetition_penalty=2, seen=[0, 0, 3])
    expected = torch.tensor([1.0, 1.0, 0.0, -2.0, -torch.inf]).softmax(0)
    assert torch.allclose(odds, expected, atol=0.04)
    assert LOGITS[0] == 2  # the caller's are untouched


@pytest.mark.security
@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"])
@pytest.mark.parametrize("value", [-1, 1e30, math.nan, math.inf, None, "many", "", [], {}])
def test_a_value_that_makes_no_sense_is_refused_in_words(name, value):  # E3
    with pytest.raises(InputError) as refused:
        Sampling.of(**{name: value})
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.security
def test_all_bad_values_are_named_at_once_and_briefly():
    with pytest.raises(InputError) as refused:
        Sampling.of(max_tokens=3.7, top_k=10**9, seed="x" * 1000, colour="red")
    assert all(name in str(refused.value) for name in ("max_tokens 3.7", "top_k 1000000000", "seed 'xxx", "colour"))
    assert len(str(refused.value)) < 500


def test_numbers_that_are_whole_may_come_as_floats_and_as_text():
    assert Sampling.of(max_tokens=40.0, seed="7") == Sampling(max_tokens=40, seed=7)
