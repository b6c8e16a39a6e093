"""Windows: what they cover, and an order that depends on seed, epoch and position alone."""

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.config.sections import WindowsConfig
from pipeline.data.batches import (  # fmt: skip
    IGNORED,
    Split,
    make_batch,
    n_windows,
    steps_of,
    steps_per_epoch,
)
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.system.distributed import ALONE, World

IDS = np.arange(1000, 1043, dtype=np.uint16)  # 43 tokens: 42 targets, four windows of 10 and one of 2
SPLIT = Split(Tokens("text", [IDS[:17], IDS[17:]], 50257), Vocabulary.full(50257), torch.device("cpu"))


def config(**changes):
    return WindowsConfig.model_validate(
        {"seq_len": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "order": "shuffled", **changes}
    )


def targets_of(batches):
    return [t for step in batches for batch in step for t in batch.targets.flatten().tolist() if t != IGNORED]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_an_epoch_has_every_token_but_the_first_exactly_once_as_a_target(order):
    steps = islice(steps_of(1, SPLIT, config(order=order, micro_batch_size=1), seed=1), n_windows(len(IDS), 10))
    assert sorted(targets_of(steps)) == list(range(1001, 1043))


def test_each_target_is_the_token_after_its_input():
    batch = next(steps_of(1, SPLIT, config(), seed=1))[0]
    known = batch.targets != IGNORED
    assert torch.equal(batch.targets[known], batch.inputs[known] + 1)


def test_the_last_window_is_padded_and_its_padding_counts_nowhere():
    batch = make_batch(SPLIT, [40], 10)
    assert batch.targets.tolist() == [[1041, 1042] + [IGNORED] * 8]
    assert batch.inputs.tolist() == [[1040, 1041] + [1042] * 8]
    assert batch.n_targets == 2


def test_sequential_windows_come_in_the_texts_order():
    batch = next(steps_of(1, SPLIT, config(order="sequential"), seed=1))[0]
    assert batch.inputs[:, 0].tolist() == [1000, 1010]


def test_the_order_differs_from_epoch_to_epoch_and_from_seed_to_seed():
    def first_epoch(seed, skip):
        steps = list(islice(steps_of(1 + skip, SPLIT, config(micro_batch_size=1), seed), 5))
        return [step[0].inputs[0, 0].item() for step in steps]

    assert len({tuple(first_epoch(seed, skip)) for seed in (1, 2) for skip in (0, 5)}) == 4


@pytest.mark.parametrize("order", ["shuffled", "sequential", "random"])
def test_starting_at_a_later_step_gives_what_running_up_to_it_gives(order):
    settings = config(order=order, micro_batch_size=3, gradient_accumulation_steps=2)
    through = list(islice(steps_of(1, SPLIT, settings, seed=7), 6))[4]  # two epochs in
    direct = next(steps_of(5, SPLIT, settings, seed=7))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(through, direct, strict=True))


def test_random_windows_begin_anywhere_and_fit():
    steps = islice(steps_of(1, SPLIT, config(order="random"), seed=1), 100)
    starts = {batch.inputs[i, 0].item() for step in steps for batch in step for i in range(2)}
    assert starts == set(range(1000, 1033))  # all 33 places with room for ten targets


def test_a_step_holds_its_batches_of_windows():
    step = next(steps_of(1, SPLIT, config(micro_batch_size=2, gradient_accumulation_steps=3), seed=1))
    assert [tuple(batch.inputs.shape) for batch in step] == [(2, 10)] * 3
    assert steps_per_epoch(43, config(micro_batch_size=2, gradient_accumulation_steps=3)) == 1


@pytest.mark.parametrize("order", ["shuffled", "sequential", "random"])
def test_the_processes_of_a_world_share_each_batch_between_them(order):
    settings = config(order=order, micro_batch_size=4, gradient_accumulation_steps=2)
    whole, *shares = (list(islice(steps_of(1, SPLIT, settings, 3, share), 3)) for share in (ALONE, *halves()))
    for step, parts in enumerate(zip(*shares, strict=True)):
        for all_of_it, first, second in zip(whole[step], *parts, strict=True):
            assert torch.equal(all_of_it.inputs, torch.cat([first.inputs, second.inputs]))
            assert torch.equal(all_of_it.targets, torch.cat([first.targets, second.targets]))
            assert first.n_targets == second.n_targets == all_of_it.n_targets


def halves():
    return World(0, 2), World(1, 2)


def test_the_order_of_an_epoch_is_that_of_all_records():
    epoch = np.random.Generator(np.random.PCG64(np.random.SeedSequence((7, 2)))).permutation(5)
    steps = islice(steps_of(11, SPLIT, config(micro_batch_size=1), 7), 5)  # the third epoch
    assert [(step[0].inputs[0, 0].item() - 1000) // 10 for step in steps] == epoch.tolist()
