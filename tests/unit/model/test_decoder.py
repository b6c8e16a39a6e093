"""The decoder against the model that it was made of."""

import numpy as np
import pytest
import torch

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.decoder import GROWTH, Decoder
from pipeline.model.gpt import GPT

FAST_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
SHAPE = ModelConfig(n_layer=2, n_head=3, n_embd=24, block_size=160, vocab_size=50257, dropout=0.1, fold_vocab=True)


@pytest.fixture(scope="module")
def model():
    """Its weights are far from their beginning, so that nothing is close by chance."""
    model = GPT(SHAPE, Vocabulary(np.arange(50), 50257)).initialise(seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture(scope="module")
def compact_ids():
    return torch.randint(50, (3, 150), generator=torch.Generator().manual_seed(0))


def cached_hidden(decoder, compact_ids, cuts):
    """What the head reads, where all compact_ids up to the first cut are read at once, and then from cut to cut."""
    cache = decoder.new_cache(len(compact_ids))
    parts = [decoder.prefill(compact_ids[:, : cuts[0]], cache, list(range(len(compact_ids))))]
    for begin, end in zip(cuts, [*cuts[1:], compact_ids.shape[1]], strict=True):
        parts.append(decoder.extend(compact_ids[:, begin:end], [begin] * len(compact_ids), cache))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("cuts", [list(range(1, 150)), [140, 141, 149], [3, GROWTH, GROWTH + 1, 2 * GROWTH]])
def test_cached_logits_equal_uncached_ones(model, compact_ids, cuts):
    decoder = Decoder(model)
    logits = decoder.logits(cached_hidden(decoder, compact_ids, cuts))
    with torch.no_grad():
        uncached = model(compact_ids)
    assert torch.allclose(logits[..., :50], uncached[..., :50], atol=1e-4)  # they reach 20; fp32 has 7 digits
    assert (logits[..., 50] == -torch.inf).all()


def test_a_sequence_is_read_alike_alone_and_in_a_batch(model, compact_ids):
    decoder = Decoder(model)
    together = cached_hidden(decoder, compact_ids, [5, 6, 9])
    for i in range(len(compact_ids)):
        assert torch.allclose(together[i], cached_hidden(decoder, compact_ids[i : i + 1], [5, 6, 9])[0], atol=1e-5)


def test_sequences_of_different_lengths_do_not_see_each_others_padding(model, compact_ids):
    decoder, lengths = Decoder(model), [4, 70, 1]
    cache = decoder.new_cache(3)
    decoder.prefill(compact_ids[:, :70], cache, [0, 1, 2])  # padded, for all but the second
    new = torch.stack([compact_ids[i, n : n + 2] for i, n in enumerate(lengths)])
    hidden = decoder.extend(new, lengths, cache)
    for i, n in enumerate(lengths):
        with torch.no_grad():
            assert torch.allclose(hidden[i], model.hidden(compact_ids[i : i + 1, : n + 2])[0, n:], atol=1e-4)


def test_a_rejected_draft_leaves_no_trace(model, compact_ids):
    decoder = Decoder(model)
    cache = decoder.new_cache(3)
    decoder.prefill(compact_ids[:, :5], cache, [0, 1, 2])
    decoder.extend(compact_ids[:, 50:58], [5] * 3, cache)
    hidden = decoder.extend(compact_ids[:, 5:7], [5] * 3, cache)
    assert torch.allclose(hidden, cached_hidden(decoder, compact_ids[:, :7], [5])[:, 5:], atol=1e-5)


def test_a_sequence_that_begins_anew_leaves_the_others_alone(model, compact_ids):
    decoder = Decoder(model)
    cache = decoder.new_cache(3)
    decoder.prefill(compact_ids[:, :9], cache, [0, 1, 2])
    decoder.prefill(compact_ids[1:2, 100:103], cache, [1])
    cache.select([2, 1])
    hidden = decoder.extend(compact_ids[:2, 20:21], [9, 3], cache)
    with torch.no_grad():
        for i, seen in enumerate([compact_ids[2, :9], compact_ids[1, 100:103]]):
            expected = model.hidden(torch.cat([seen, compact_ids[i, 20:21]])[None])[0, -1]
            assert torch.allclose(hidden[i, 0], expected, atol=1e-4)


def test_the_cache_gcompact_ids_up_to_the_trained_length_and_no_further(model, compact_ids):
    cache = Decoder(model).new_cache(1)
    lengths = []
    for n in (1, GROWTH, GROWTH + 1, 160):
        cache.reserve(n)
        lengths.append(cache.keys[0].shape[2])
    assert lengths == [64, 64, 128, 160]


def test_losses_are_the_models_own_also_where_the_target_is_new_to_it(model, compact_ids):
    decoder, targets = Decoder(model), compact_ids[:1, 1:11].clone()
    targets[0, 3] = 50  # the representative of all ids that never occur
    losses = decoder.losses(decoder.prefill(compact_ids[:1, :10], decoder.new_cache(1), [0])[0], targets[0])
    with torch.no_grad():
        assert torch.allclose(losses, model.token_losses(compact_ids[:1, :10], targets)[0], atol=1e-4)


def test_an_unfolded_model_never_samples_padding():
    full = GPT(SHAPE.model_copy(update={"vocab_size": 50304}), Vocabulary.full(50304)).initialise(seed=1)
    logits = Decoder(full, n_vocab=50257).logits(torch.ones(2, 24))
    assert (logits[:, 50257:] == -torch.inf).all()
    assert logits[:, :50257].isfinite().all()


@pytest.mark.skipif(not FAST_BF16, reason="this chip has no fast bf16")
def test_bf16_is_as_close_as_under_autocast(model, compact_ids):
    with torch.no_grad():
        exact = model(compact_ids)[..., :50]
        with torch.autocast("cpu", torch.bfloat16):
            usual = model(compact_ids)[..., :50].float()
    decoder = Decoder(model, "bf16")
    logits = decoder.logits(cached_hidden(decoder, compact_ids, [100, 101, 102]))[..., :50]
    assert (logits - exact).abs().mean() < 1.5 * (usual - exact).abs().mean()
    assert (logits - exact).abs().mean() > 0  # it is not fp32 in disguise
