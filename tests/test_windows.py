"""Windows: what they cover, and an order that depends on seed, epoch and position alone."""

from itertools import islice

import pytest
import torch

from pipeline.windows import IGNORED, WindowsConfig, gather, n_windows, steps_of, steps_per_pass

IDS = torch.arange(1000, 1043)  # 43 tokens: 42 targets, four windows of 10 and one of 2


def config(**changes):
    return WindowsConfig.model_validate({"length": 10, "batch": 2, "accumulate": 1, "order": "shuffled", **changes})


def targets_of(batches):
    return [t for step in batches for batch in step for t in batch.targets.flatten().tolist() if t != IGNORED]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_one_pass_sees_every_token_but_the_first_exactly_once_as_a_target(order):
    steps = islice(steps_of(1, IDS, config(order=order, batch=1), seed=1), n_windows(len(IDS), 10))
    assert sorted(targets_of(steps)) == list(range(1001, 1043))


def test_each_target_is_the_token_after_its_input():
    batch = next(steps_of(1, IDS, config(), seed=1))[0]
    known = batch.targets != IGNORED
    assert torch.equal(batch.targets[known], batch.inputs[known] + 1)


def test_the_last_window_is_padded_and_its_padding_counts_nowhere():
    batch = gather(IDS, [40], 10)
    assert batch.targets.tolist() == [[1041, 1042] + [IGNORED] * 8]
    assert batch.n_targets == 2


def test_sequential_windows_come_in_the_texts_order():
    batch = next(steps_of(1, IDS, config(order="sequential"), seed=1))[0]
    assert batch.inputs[:, 0].tolist() == [1000, 1010]


def test_the_order_differs_from_pass_to_pass_and_from_seed_to_seed():
    def first_pass(seed, skip):
        steps = list(islice(steps_of(1 + skip, IDS, config(batch=1), seed), 5))
        return [step[0].inputs[0, 0].item() for step in steps]

    assert len({tuple(first_pass(seed, skip)) for seed in (1, 2) for skip in (0, 5)}) == 4


@pytest.mark.parametrize("order", ["shuffled", "sequential", "random"])
def test_starting_at_a_later_step_gives_what_running_up_to_it_gives(order):
    settings = config(order=order, batch=3, accumulate=2)
    through = list(islice(steps_of(1, IDS, settings, seed=7), 6))[4]  # two passes in
    direct = next(steps_of(5, IDS, settings, seed=7))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(through, direct, strict=True))


def test_random_windows_begin_anywhere_and_fit():
    steps = islice(steps_of(1, IDS, config(order="random"), seed=1), 100)
    starts = {batch.inputs[i, 0].item() for step in steps for batch in step for i in range(2)}
    assert starts == set(range(1000, 1033))  # all 33 places with room for ten targets


def test_a_step_holds_its_batches_of_windows():
    step = next(steps_of(1, IDS, config(batch=2, accumulate=3), seed=1))
    assert [tuple(batch.inputs.shape) for batch in step] == [(2, 10)] * 3
    assert steps_per_pass(43, config(batch=2, accumulate=3)) == 1
