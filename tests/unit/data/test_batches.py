"""Batches of windows: what they contain, and an order that depends only on seed, epoch and position."""

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.config.sections import WindowsConfig
from pipeline.data.batches import (
    IGNORED,
    Split,
    TrainingData,
    fixed_windows,
    make_batch,
    sliding_windows,
    steps_of,
    steps_per_epoch,
    windows_per_epoch,
)
from pipeline.data.token_files import Tokens, write_shard
from pipeline.data.vocab import Vocabulary
from pipeline.system.distributed import World
from pipeline.system.errors import InputError
from pipeline.system.files import write_manifest

IDS = np.arange(1000, 1043, dtype=np.uint16)  # 43 tokens: 42 targets, four windows of 10 and one of 2
SPLIT = Split(Tokens("text", [IDS[:17], IDS[17:]], 50257), Vocabulary.full(50257), torch.device("cpu"))
ORDERS = ["jittered", "shuffled", "sequential", "random"]


def config(**changes):
    return WindowsConfig.model_validate(
        {"seq_len": 10, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "order": "shuffled", **changes}
    )


def starts(order, seed, epoch, n=5):
    """First tokens of the first `n` windows of an epoch, counted from 0."""
    steps = islice(steps_of(1 + 5 * epoch, SPLIT, config(order=order), seed), n)
    return [step[0].inputs[0, 0].item() - 1000 for step in steps]


@pytest.mark.parametrize("n", [9, 10, 12, 19, 20, 29, 43])  # tokens of the text
@pytest.mark.parametrize("order", ["jittered", "shuffled", "sequential"])
def test_an_epoch_has_each_token_but_the_first_as_a_target_after_its_input(order, n):
    split = SPLIT._replace(tokens=Tokens("text", [IDS[:n]], 50257))
    for epoch in range(3):
        targets, size = [], windows_per_epoch(n, 8, order)
        for (batch,) in islice(steps_of(1 + size * epoch, split, config(order=order, seq_len=8), seed=1), size):
            known = batch.targets != IGNORED
            assert torch.equal(batch.targets[known], batch.inputs[known] + 1)
            assert 0 < batch.n_targets == known.sum() <= 8
            targets += batch.targets[known].tolist()
        assert set(targets) == set(range(1001, 1000 + n))
        assert order == "jittered" or len(targets) == n - 1  # each once


def test_jittered_windows_are_at_most_a_window_apart_and_start_everywhere():
    T, settings = 16, config(order="jittered", seq_len=16)
    split = SPLIT._replace(tokens=Tokens("text", [np.arange(2000, dtype=np.uint16)], 50257))
    n, found = windows_per_epoch(2000, T, "jittered"), []
    for epoch in range(20):
        steps = islice(steps_of(1 + n * epoch, split, settings, seed=1), n)
        starts = np.sort([step[0].inputs[0, 0].item() for step in steps])
        assert 3 * T / 4 - 1 <= np.diff(starts)[1:-1].min() <= np.diff(starts).max() <= T
        found.append(starts[1:-1] % T)
    counts = np.bincount(np.concatenate(found))
    assert len(counts) == T
    assert counts.min() > 0.7 * counts.mean()  # a window may start anywhere
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(("n", "T"), [(2, 8), (9, 8), (10, 8), (13, 8), (43, 8), (43, 2), (43, 3), (1000, 64)])
def test_sliding_windows_count_each_target_once_after_at_least_half_a_window(n, T):
    windows = sliding_windows(n, T)
    counted = [start + i for start, first in windows for i in range(first, min(T, n - 1 - start))]
    assert counted == list(range(n - 1))
    assert (windows[0] == 0).all()
    assert all(first >= T // 2 for _, first in windows[1:])


def test_sliding_windows_start_everywhere():
    assert len(set(sliding_windows(5000, 16)[:, 0] % 16)) == 16


def test_the_last_window_is_padded_and_its_padding_has_no_targets():
    batch = make_batch(SPLIT, np.array([[40, 0], [38, 3]]), 10)
    assert batch.targets.tolist() == [[1041, 1042] + [IGNORED] * 8, [IGNORED] * 3 + [1042] + [IGNORED] * 6]
    assert batch.inputs.tolist() == [[1040, 1041] + [1042] * 8, [1038, 1039, 1040, 1041] + [1042] * 6]
    assert batch.n_targets == 3
    assert fixed_windows(43, 10, shift=15).tolist() == [[15, 0], [25, 0], [35, 0]]


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
    with pytest.raises(InputError, match=r"has 50257 ids, the model 50256: run `dvc repro -f tokenize`"):
        TrainingData.read(tmp_path, bpe, 10, 50256, True, torch.device("cpu"))
