"""The choices of a plan, as tables: tokenizer, shape, window, target, epochs, and the part that fits into a time."""

import math

import pytest

from pipeline.ops.policy import (
    BITS_PER_PARAMETER,
    GENERALISE,
    MEMORISE,
    MOST_REPEATED,
    SHAPES,
    Training,
    choose_tokenizer,
    epochs_to_generalise,
    epochs_to_memorise,
    generalise,
    held_out_target,
    held_out_window,
    largest_within,
    memorise,
    repetition_factor,
    shape_for,
    values_of,
    window_and_target,
)
from pipeline.system.errors import InputError


@pytest.mark.parametrize(
    ("n_bytes", "characters", "ascii_share", "tokens", "chosen", "why"),
    [
        (60_000, 60_000, 1.0, {"gpt2": 15_000}, "gpt2", "4.0 bytes of this text a token"),  # English
        (60_000, 59_000, 0.97, {"gpt2": 25_000, "bpe:1024": 20_000}, "bpe:1024", "only 2.4 bytes"),  # German
        (60_000, 59_000, 1.0, {"gpt2": None, "bpe:1024": 20_000}, "bpe:1024", "could not be downloaded"),  # offline
        (60_000, 33_000, 0.1, {"bpe:1024": 15_000}, "bpe:1024", "90% of the bytes are not ASCII"),  # Arabic
        (60_000, 20_000, 0.02, {"bpe:512": 17_000}, "chars", "98% of the bytes are not ASCII"),  # a Chinese chapter
        (3e6, 1e6, 0.02, {"bpe:16384": 6e5}, "bpe:16384", "tokens that are trained on it have 5.0"),  # a Chinese novel
        (3e6, 1e6, 0.02, {"bpe:16384": None, "bpe:8192": 6e5}, "bpe:8192", "5.0"),  # has fewer pairs than that
        (60_000, 60_000, 1.0, {"gpt2": 24_000, "bpe:1024": 25_000}, "gpt2", "2.5 bytes of this text a token"),  # code
        (9_000, 9_000, 1.0, {"gpt2": 4_000}, "gpt2", "2.2 bytes"),  # short
        (9_000, 9_000, 1.0, {"gpt2": 8_000}, "chars", "only 1.1 bytes"),  # numbers
        (1_000, 400, 0.3, {}, "chars", "too short to train longer ones"),
    ],
)
def test_the_tokenizer_gives_few_tokens_that_occur_often(n_bytes, characters, ascii_share, tokens, chosen, why):
    choice = choose_tokenizer(n_bytes, characters, ascii_share, tokens.__getitem__)  # asked for no other one
    assert choice.value == chosen
    assert why in choice.why


@pytest.mark.parametrize(
    ("n_tokens", "bits", "layers", "width"),
    [(285, 6.4, 2, 128), (2_805, 8.0, 2, 128), (15_477, 8.5, 2, 256), (34_219, 9, 2, 512), (338_025, 9.2, 6, 384)],
)
def test_the_shape_is_the_one_that_was_measured_for_texts_of_this_size(n_tokens, bits, layers, width):
    shape = shape_for(n_tokens * bits)
    assert (shape.n_layer, shape.n_embd) == (layers, width)


def test_each_shape_has_the_capacity_for_the_texts_that_it_is_chosen_for():
    for shape, larger in zip(SHAPES, [*SHAPES[1:], None], strict=True):
        assert shape.capacity_bits == BITS_PER_PARAMETER * 12 * shape.n_layer * shape.n_embd**2
        assert shape.capacity_bits >= 8 * shape.max_bits
        assert shape.n_embd % shape.n_head == 0
        if larger:
            assert larger.max_bits > shape.max_bits
            assert larger.capacity_bits > shape.capacity_bits
    assert shape_for(1e15) is SHAPES[-1]


@pytest.mark.parametrize(
    ("n_tokens", "step_tokens", "target", "ambiguity", "needed"),
    [  # epochs after which runs had reached the target
        (285, 256, 0.1, 0, 57),
        (2_805, 256, 0.1, 0, 21.6),
        (15_477, 512, 0.1, 0, 13.4),
        (34_219, 1024, 0.1, 0.01, 11.6),
        (34_219, 1024, 0.01, 0.01, 16.0),
        (8_036, 512, 0.1, 0.16, 19.6),  # texts that were made from templates
        (14_024, 512, 0.1, 0.39, 21.5),
        (11_007, 512, 0.1, 0.69, 24.0),
        (3_221, 256, 0.1, 1.2, 59.8),
    ],
)
def test_the_budget_is_what_was_needed_and_up_to_twice_that(n_tokens, step_tokens, target, ambiguity, needed):
    assert needed < epochs_to_memorise(n_tokens, step_tokens, target, ambiguity) < 2 * needed


def test_a_text_that_repeats_its_passages_gets_more_epochs_up_to_a_limit():
    found = [repetition_factor(ambiguity) for ambiguity in (0, 0.5, 1, 6)]
    assert found == [1, 1.75, 3, MOST_REPEATED]


def test_a_longer_text_gets_fewer_epochs_and_one_at_least():
    sizes = (2_000, 15_000, 338_000, 7_500_000, 10**10)
    found = [epochs_to_generalise(n) for n in sizes]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1.0
    training = generalise(20_000, 9, 128)  # a tenth is held out
    assert training.max_epochs == epochs_to_generalise(18_000)
    assert training.steps == math.ceil(training.max_epochs * 18_000 / (training.step_windows * 128))


LOWEST = {32: 0.5, 64: 0.2, 128: 0.05, 256: 0.01}  # window -> lowest possible loss


@pytest.mark.parametrize(
    ("lowest", "target", "found"),
    [
        ({32: 0.0, 64: 0.0, 128: 0.0}, None, (64, 0.02)),
        ({64: 0.01, 128: 0.0}, None, (64, 0.02)),
        ({64: 0.0101, 128: 0.0}, None, (64, 0.1)),  # .02 is less than twice the lowest possible loss
        (LOWEST, None, (128, 0.1)),
        (LOWEST, 0.3, (64, 0.3)),
        (LOWEST, 0.0126, (256, 0.0126)),
        ({64: 0.9, 128: 0.7}, None, (128, 0.88)),  # a quarter above the lowest possible loss, rounded up
        ({32: 0.0}, None, (32, 0.02)),  # a text of fewer than 64 tokens
        (
            LOWEST,
            0.012,
            "--target 0.012 is not possible: .* in windows of 256 tokens no model gets below 0.010: .*0.02",
        ),
        (LOWEST, -1.0, "--target -1: give a loss above 0"),
        (LOWEST, math.nan, "--target nan: give a loss above 0"),
    ],
)
def test_the_window_is_the_shortest_in_which_the_target_is_possible(lowest, target, found):
    if isinstance(found, tuple):
        assert window_and_target(lowest, 0.0, target) == found
    else:
        with pytest.raises(InputError, match=found):
            window_and_target(lowest, 0.0, target)


def test_a_text_that_repeats_its_passages_gets_a_target_that_it_reaches_in_time():
    for ambiguity, target in ((0.0, 0.02), (0.09, 0.02), (0.1, 0.1), (1.2, 0.1)):
        assert window_and_target({64: 0.0}, ambiguity, None) == (64, target)
        assert window_and_target({64: 0.0}, ambiguity, 0.03) == (64, 0.03)


def test_a_held_out_target_must_be_possible_for_a_text_of_this_size():
    assert held_out_target(10_000, 5.0, None) == 3.75
    assert held_out_target(10_000, 5.0, 4.2) == 4.2
    for n_tokens, target, words in [
        (1_999, None, "1,999 tokens, too few to hold out a tenth"),
        (10_000, 3.7, "--target 3.7: the text is too small for it, counts of n-grams reach 5.00"),
        (10_000, 0.0, "give a loss above 0"),
    ]:
        with pytest.raises(InputError, match=words):
            held_out_target(n_tokens, 5.0, target)
    assert [held_out_window(lengths) for lengths in ([32, 64, 128, 256], [32, 64], [256])] == [128, 64, 256]


def test_a_time_limits_the_part_of_the_text_and_a_smaller_part_gets_a_smaller_model():
    def seconds_of(training):
        return training.steps * training.shape.n_layer * training.shape.n_embd / 1e4

    def training_on(n):
        return memorise(n, 9, 64, 0.1, 0.0)

    whole = training_on(1_000_000)
    assert largest_within(1e9, whole.n_tokens, training_on, seconds_of) == whole
    part = largest_within(100, whole.n_tokens, training_on, seconds_of)
    more = training_on(int(part.n_tokens / 0.94))
    assert seconds_of(part) <= 100 < seconds_of(more)
    assert part.shape.capacity_bits < whole.shape.capacity_bits
    assert largest_within(0.1, whole.n_tokens, training_on, seconds_of) is None
    assert largest_within(5, 10_000, training_on, lambda training: training.n_tokens / 100) is None  # 500 tokens fit


@pytest.mark.parametrize("goal", [MEMORISE, GENERALISE])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_values_are_those_of_the_training(goal, shape):
    training = Training(shape, 64, 50_000, 10)
    values = values_of(training, goal, 0.5)
    windows = values["windows.micro_batch_size"] * values["windows.gradient_accumulation_steps"]
    assert windows == training.step_windows
    assert values["windows.micro_batch_size"] * 64 <= 8192
    assert values["windows.seq_len"] == values["model.block_size"] == 64
    held_out = goal == GENERALISE
    assert values["target.rule"] == ("validation" if held_out else "sliding")
    assert bool(values["corpus.val_fraction"]) is bool(values["target.early_stopping_patience"]) is held_out
    assert values["model.dropout"] == 0 or held_out
