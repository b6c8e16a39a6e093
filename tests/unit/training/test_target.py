"""The target rules, and when a pass over the text is worth its cost."""

import pytest

from pipeline.config.sections import TargetConfig
from pipeline.training.target import (
    best_step,
    check_is_worth_it,
    first_met,
    is_met,
    is_out_of_patience,
    look_is_due,
    needs_corpus_loss,
)

TARGET = TargetConfig(loss=0.1, rule="corpus", average_steps=3, eval_interval=None, early_stopping_patience=None)


def rows(losses, looks=(), held_out=()):
    return [
        {"step": i, "tokens": 10 * i, "loss": loss, "grad_norm": 1.0, "lr": 0.1}
        | ({"corpus_loss": dict(looks)[i]} if i in dict(looks) else {})
        | ({"validation_loss": dict(held_out)[i]} if i in dict(held_out) else {})
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


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 100])
def test_no_look_is_worth_it_before_there_is_a_mean(steps_per_epoch):
    assert not check_is_worth_it([], steps_per_epoch, TARGET)


def looked(*losses):
    """Split with a look at the held-out text at every second step."""
    return rows([1] * 2 * len(losses), held_out=[(2 * i, loss) for i, loss in enumerate(losses, start=1)])


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([], False),
        ([5, 6], False),
        ([5, 6, 7], True),
        ([5, 5, 5], True),  # the same is not lower
        ([5, 6, 4.9], False),
        ([5, 6, 4, 5], False),
        ([5, 6, 4, 5, 4.5], True),
    ],
)
def test_patience_counts_the_looks_since_the_lowest_held_out_loss(losses, over):
    assert is_out_of_patience(looked(*losses), TARGET.updated(early_stopping_patience=2)) is over


def test_steps_without_a_look_cost_no_patience():
    history = looked(5, 6) + rows([1] * 100)
    assert not is_out_of_patience(history, TARGET.updated(early_stopping_patience=2))


def test_without_patience_given_no_loss_ends_a_run():
    assert not is_out_of_patience(looked(*range(1, 100)), TARGET)


def test_the_best_step_is_by_the_text_of_the_rule_and_the_first_of_equals():
    history = rows([1] * 4, looks=[(1, 3), (2, 2), (3, 1)], held_out=[(1, 5), (2, 4), (3, 4), (4, 6)])
    assert best_step(history, TARGET) == best_step(history, TARGET.updated(rule="batch")) == 3
    assert best_step(history, TARGET.updated(rule="validation")) == 2
    assert best_step(rows([1]), TARGET) is None


def test_fixed_looks_come_at_their_steps_alone():
    fixed = TARGET.updated(eval_interval=4)
    low = rows([0.01] * 9)  # where a pass would be worth it at each step
    assert [n for n in range(1, 10) if look_is_due(low[:n], 3, True, fixed)] == [4, 8]


def test_a_held_out_text_is_looked_at_after_each_pass():
    assert [n for n in range(1, 10) if look_is_due(rows([9] * n), 3, True, TARGET)] == [3, 6, 9]
    assert not any(look_is_due(rows([9] * n), 3, False, TARGET) for n in range(1, 10))


def test_the_training_text_is_measured_where_something_hangs_on_it():
    fixed = TARGET.updated(rule="validation", eval_interval=2)
    lower, higher = looked(5, 6, 4), looked(5, 6, 5.5)
    assert needs_corpus_loss(lower, fixed)
    assert not needs_corpus_loss(higher, fixed)
    assert needs_corpus_loss(higher, fixed.updated(eval_interval=None))  # the next look is set by it
    assert needs_corpus_loss(higher, fixed.updated(rule="corpus"))


@pytest.mark.parametrize(("rule", "patience", "named"), [("validation", None, "rule"), ("corpus", 3, "patience is 3")])
def test_what_needs_a_held_out_text_is_named(rule, patience, named):
    assert TARGET.needs_held_out is None
    assert named in TARGET.updated(rule=rule, early_stopping_patience=patience).needs_held_out
