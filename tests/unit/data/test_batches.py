"""Batches of windows: what they contain, and an order that depends only on seed, epoch and position."""

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.config.sections import WindowsConfig
from pipeline.data.batches import IGNORED, Split, TrainingData, make_batch, steps_of, steps_per_epoch
from pipeline.data.token_files import Tokens, write_shard
from pipeline.data.vocab import Vocabulary
from pipeline.system.distributed import World
from pipeline.system.errors import InputError
from pipeline.system.files import write_manifest

IDS = np.arange(1000, 1043, dtype=np.uint16)  # 43 tokens: 42 targets, four windows of 10 and one of 2
SPLIT = Split(Tokens("text", [IDS[:17], IDS[17:]], 50257), Vocabulary.full(50257), torch.device("cpu"))
ORDERS = ["shuffled", "sequential", "random"]


def config(**changes):
    return WindowsConfig.model_validate(
        {"seq_len": 10, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "order": "shuffled", **changes}
    )


def starts(order, seed, epoch, n=5):
    """First tokens of the first `n` windows of an epoch, counted from 0."""
    steps = islice(steps_of(1 + 5 * epoch, SPLIT, config(order=order), seed), n)
    return [step[0].inputs[0, 0].item() - 1000 for step in steps]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_an_epoch_has_each_token_but_the_first_once_as_a_target_after_its_input(order):
    targets = []
    for (batch,) in islice(steps_of(1, SPLIT, config(order=order), seed=1), 5):
        known = batch.targets != IGNORED
        assert torch.equal(batch.targets[known], batch.inputs[known] + 1)
        targets += batch.targets[known].tolist()
    assert sorted(targets) == list(range(1001, 1043))


def test_the_last_window_is_padded_and_its_padding_has_no_targets():
    batch = make_batch(SPLIT, [40], 10)
    assert batch.targets.tolist() == [[1041, 1042] + [IGNORED] * 8]
    assert batch.inputs.tolist() == [[1040, 1041] + [1042] * 8]
    assert batch.n_targets == 2


def test_each_order_is_as_documented():
    for seed, epoch in ((7, 0), (7, 2), (8, 2)):
        shuffled = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(5)
        assert starts("shuffled", seed, epoch) == (10 * shuffled).tolist()
        assert starts("sequential", seed, epoch) == [0, 10, 20, 30, 40]
    assert set(starts("random", 1, 0, n=200)) == set(range(33))  # all 33 positions with room for ten targets
    assert starts("random", 1, 0) != starts("random", 1, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_a_later_step_is_the_same_without_the_steps_before(order):
    settings = config(order=order, micro_batch_size=3, gradient_accumulation_steps=2)
    through = list(islice(steps_of(1, SPLIT, settings, seed=7), 6))[4]  # in the fifth epoch
    direct = next(steps_of(5, SPLIT, settings, seed=7))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(through, direct, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_the_processes_of_a_world_share_each_batch(order):
    settings = config(order=order, micro_batch_size=4, gradient_accumulation_steps=2)
    whole = list(islice(steps_of(1, SPLIT, settings, 3), 3))
    shares = [list(islice(steps_of(1, SPLIT, settings, 3, World(rank, 2)), 3)) for rank in (0, 1)]
    for step, first_share, second_share in zip(whole, *shares, strict=True):
        assert [tuple(batch.inputs.shape) for batch in step] == [(4, 10)] * 2
        for batch, first, second in zip(step, first_share, second_share, strict=True):
            assert torch.equal(batch.inputs, torch.cat([first.inputs, second.inputs]))
            assert torch.equal(batch.targets, torch.cat([first.targets, second.targets]))
            assert first.n_targets == second.n_targets == batch.n_targets


def test_the_steps_of_an_epoch_are_rounded_up():
    steps = {n: steps_per_epoch(43, config(micro_batch_size=2, gradient_accumulation_steps=n)) for n in (1, 2, 3)}
    assert steps == {1: 3, 2: 2, 3: 1}  # for five windows


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, bpe):
    write_shard(tmp_path / "train-00000.bin", [IDS], 50257)
    write_shard(tmp_path / "val-00000.bin", [[]], 50257)
    write_manifest(tmp_path)
    with pytest.raises(InputError, match=r"has 50257 ids, model.vocab_size is 50256: make model\.vocab_size larger"):
        TrainingData.read(tmp_path, bpe, 10, 50256, True, torch.device("cpu"))
