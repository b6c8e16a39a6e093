"""The target rules, and when a pass over the text is worth its cost."""

import pytest

from pipeline.target import TargetConfig, check_is_worth_it, first_met, is_met

TARGET = TargetConfig(loss=0.1, rule="corpus", average_steps=3)


def rows(losses, looks=()):
    return [
        {"step": i, "tokens": 10 * i, "loss": loss, "grad_norm": 1.0, "lr": 0.1}
        | ({"corpus_loss": dict(looks)[i]} if i in dict(looks) else {})
        for i, loss in enumerate(losses, start=1)
    ]


def test_batch_is_met_by_one_lucky_minibatch():
    assert first_met(rows([1, 0.09, 0.5]), TARGET)["batch"] == 2


def test_average_needs_its_full_number_of_minibatches():
    assert not is_met(rows([0.01, 0.01]), "average", TARGET)
    assert first_met(rows([0.5, 0.2, 0.1, 0.09, 0.05]), TARGET)["average"] == 5


def test_corpus_is_met_by_a_look_alone():
    history = rows([0.01, 0.01, 0.01, 0.01], looks=[(2, 0.11), (4, 0.09)])
    assert first_met(history, TARGET) == {"batch": 1, "average": 3, "corpus": 4, "validation": None}


def test_the_target_itself_is_not_below_the_target():
    assert not is_met(rows([0.1]), "batch", TARGET)


def test_what_was_not_reached_is_none():
    assert set(first_met(rows([5, 4]), TARGET).values()) == {None}


def test_the_first_look_comes_when_the_running_mean_is_near():
    assert not check_is_worth_it(rows([1, 1, 1, 0.1]), 10, TARGET)  # mean of the last three .7
    assert check_is_worth_it(rows([1, 0.29, 0.29, 0.29]), 10, TARGET)


def test_a_look_sets_the_next_to_when_the_mean_has_fallen_by_what_is_missing():
    seen = rows([0.3, 0.3, 0.3, 0.19, 0.2, 0.2], looks=[(3, 0.15)])  # .15 has to fall by a third, so has the mean
    assert check_is_worth_it(seen, 100, TARGET)
    assert not check_is_worth_it(rows([0.3, 0.3, 0.3, 0.2, 0.2, 0.21], looks=[(3, 0.15)]), 100, TARGET)


def test_a_look_comes_after_one_pass_at_the_latest():
    seen = rows([0.2] * 8, looks=[(3, 0.2)])
    assert check_is_worth_it(seen, 5, TARGET)
    assert not check_is_worth_it(seen[:-1], 5, TARGET)


@pytest.mark.parametrize("steps_per_pass", [1, 3, 100])
def test_no_look_is_worth_it_before_there_is_a_mean(steps_per_pass):
    assert not check_is_worth_it([], steps_per_pass, TARGET)
