"""The decoder computes what the model computes without a cache."""

import numpy as np
import pytest
import torch
from small_models import random_model

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.decoder import GROWTH, Decoder

FAST_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
SHAPE = ModelConfig(n_layer=2, n_head=3, n_embd=24, block_size=160, vocab_size=50257, dropout=0.1, fold_vocab=True)
IDS = torch.randint(50, (3, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return random_model(SHAPE, Vocabulary(np.arange(50), 50257), noise=0.2)


def cached_logits(decoder, cuts):
    """Logits of IDS, where all before the first cut are read at once, and then those from cut to cut."""
    cache = decoder.new_cache(3)
    hidden = [decoder.prefill(IDS[:, : cuts[0]], cache, [0, 1, 2])]
    for begin, end in zip(cuts, [*cuts[1:], IDS.shape[1]], strict=True):
        hidden.append(decoder.extend(IDS[:, begin:end], [begin] * 3, cache))
    return decoder.logits(torch.cat(hidden, dim=1))


@pytest.mark.parametrize("cuts", [list(range(1, 150)), [140, 141, 149], [3, GROWTH, GROWTH + 1, 2 * GROWTH]])
def test_cached_logits_equal_uncached_ones(model, cuts):
    logits = cached_logits(Decoder(model), cuts)
    with torch.no_grad():
        uncached = model(IDS)
    assert torch.allclose(logits[..., :50], uncached[..., :50], atol=1e-4)  # they reach 20; fp32 has 7 digits
    assert (logits[..., 50] == -torch.inf).all()


@pytest.mark.skipif(not FAST_BF16, reason="this chip has no fast bf16")
def test_bf16_is_as_accurate_as_autocast(model):
    with torch.no_grad():
        exact = model(IDS)[..., :50]
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(IDS)[..., :50].float()
    error = (cached_logits(Decoder(model, "bf16"), [100, 101, 102])[..., :50] - exact).abs().mean()
    expected = (under_autocast - exact).abs().mean()
    assert 0.5 * expected < error < 1.5 * expected  # in fp32 it would be a thousandth
