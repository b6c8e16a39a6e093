"""The target rules: when a run meets its target, when it is evaluated, when it stops, which model is kept."""

from dataclasses import replace

import pytest

from pipeline.config.params import Params, load_params
from pipeline.config.sections import TargetConfig
from pipeline.tracking.journal import StepRecord
from pipeline.training.config import RunConfig
from pipeline.training.results import results_of
from pipeline.training.target import (
    RULES,
    Rule,
    best_step,
    evaluation_is_due,
    evaluation_pays,
    first_met,
    is_finished,
    is_out_of_patience,
    needs_corpus_loss,
)

TARGET = TargetConfig(loss=0.1, rule="corpus", average_steps=3, eval_interval=None, early_stopping_patience=None)


def records(losses, corpus=(), validation=()):
    """Steps with these minibatch losses; `corpus` and `validation` are pairs of a step and its evaluated loss."""
    return [
        StepRecord(i, 10 * i, loss, 1.0, 0.1, corpus_loss=dict(corpus).get(i), validation_loss=dict(validation).get(i))
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(
    ("losses", "corpus", "met"),
    [
        ([1, 0.09, 0.5], [], {"batch": 2}),  # one minibatch is enough
        ([0.1], [], {}),  # the target itself is not below the target
        ([0.01, 0.01], [], {"batch": 1}),  # the average needs three minibatches
        ([0.5, 0.2, 0.1, 0.09, 0.05], [], {"batch": 4, "average": 5}),
        ([0.01] * 4, [(2, 0.11), (4, 0.09)], {"batch": 1, "average": 3, "corpus": 4}),
        ([5, 4], [], {}),
    ],
)
def test_each_rule_is_met_at_its_first_step_below_the_target(losses, corpus, met):
    assert first_met(records(losses, corpus), TARGET) == {**dict.fromkeys(RULES), **met}


@pytest.mark.parametrize(
    ("losses", "corpus", "steps_per_epoch", "pays"),
    [
        ([1, 1, 1, 0.1], [], 10, False),  # the mean of the last three, 0.7, is not below three times the target
        ([1, 0.29, 0.29, 0.29], [], 10, True),
        # the corpus loss of 0.15 has to fall to two thirds, so the mean has to fall from 0.3 to 0.2
        ([0.3, 0.3, 0.3, 0.19, 0.2, 0.2], [(3, 0.15)], 100, True),
        ([0.3, 0.3, 0.3, 0.2, 0.2, 0.21], [(3, 0.15)], 100, False),
        ([0.2] * 8, [(3, 0.2)], 5, True),  # one epoch after the last evaluation
        ([0.2] * 7, [(3, 0.2)], 5, False),
        ([], [], 1, False),
        ([], [], 100, False),
    ],
)
def test_an_evaluation_pays_when_the_running_mean_suggests_that_the_target_is_near(
    losses, corpus, steps_per_epoch, pays
):
    assert evaluation_pays(records(losses, corpus), steps_per_epoch, TARGET) is pays


def evaluated(*losses):
    """Records with a validation loss at every second step."""
    return records([1] * 2 * len(losses), validation=[(2 * i, loss) for i, loss in enumerate(losses, start=1)])


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([], False),
        ([5, 6], False),
        ([5, 6, 7], True),
        ([5, 5, 5], True),  # an equal loss is not lower
        ([5, 6, 4.9], False),
        ([5, 6, 4, 5], False),
        ([5, 6, 4, 5, 4.5], True),
    ],
)
def test_patience_counts_the_evaluations_since_the_lowest_validation_loss(losses, over):
    history, two = evaluated(*losses), TARGET.updated(early_stopping_patience=2)
    assert is_out_of_patience(history, two) is over
    assert is_out_of_patience(history + records([1] * 100), two) is over  # steps without an evaluation do not count
    assert not is_out_of_patience(history, TARGET)


def test_the_best_step_has_the_lowest_loss_on_the_text_of_the_rule_and_is_the_first_of_equal_ones():
    history = records([1] * 4, corpus=[(1, 3), (2, 2), (3, 1)], validation=[(1, 5), (2, 4), (3, 4), (4, 6)])
    assert best_step(history, TARGET) == best_step(history, TARGET.updated(rule="batch")) == 3
    assert best_step(history, TARGET.updated(rule="validation")) == 2
    assert best_step(records([1]), TARGET) is None


@pytest.mark.parametrize(
    ("loss", "held_out", "eval_interval", "due"),
    [
        (0.01, True, 4, [4, 8]),  # fixed steps, although an evaluation would pay at each step
        (9, True, None, [3, 6, 9]),  # each epoch of three steps
        (9, False, None, []),
    ],
)
def test_evaluations_are_due_at_fixed_steps_or_with_a_held_out_text_after_each_epoch(
    loss, held_out, eval_interval, due
):
    target, history = TARGET.updated(eval_interval=eval_interval), records([loss] * 9)
    assert [n for n in range(1, 10) if evaluation_is_due(history[:n], 3, held_out, target)] == due


def test_the_corpus_loss_is_measured_only_where_it_affects_a_decision():
    fixed = TARGET.updated(rule="validation", eval_interval=2)
    lower, higher = evaluated(5, 6, 4), evaluated(5, 6, 5.5)
    assert needs_corpus_loss(lower, fixed)
    assert not needs_corpus_loss(higher, fixed)
    assert needs_corpus_loss(higher, fixed.updated(eval_interval=None))  # it decides when the next evaluation is due
    assert needs_corpus_loss(higher, fixed.updated(rule="corpus"))


def with_rule(rule):
    params = load_params()
    return Params({**params.values, "target": {**params.values["target"], "rule": rule}})


def test_a_new_entry_of_the_table_may_use_all_records_ends_a_run_and_is_in_its_results(monkeypatch):
    def twice(records, config):  # two evaluations in a row, any number of steps apart
        losses = [record.corpus_loss for record in records if record.corpus_loss is not None]
        return len(losses) > 1 and max(losses[-2:]) < config.loss

    monkeypatch.setitem(RULES, "twice", Rule(twice, description="two evaluations below the target"))
    target = RunConfig.of(with_rule("twice")).target
    history = records([1.0] * 16, corpus=[(5, 0.09), (16, 0.08)])
    assert [is_finished(history[:n], 99, target) for n in (5, 15, 16)] == [False, False, True]
    assert results_of(history, target, 100)["to_target"]["twice"] == {"steps": 16, "tokens": 160}


@pytest.mark.parametrize(("rule", "patience", "named"), [("validation", None, "rule"), ("corpus", 3, "patience is 3")])
def test_a_setting_that_needs_a_held_out_text_is_named(rule, patience, named):
    config = RunConfig.of(load_params())
    assert config.needs_held_out is None
    other = replace(config, target=TARGET.updated(rule=rule, early_stopping_patience=patience))
    assert named in other.needs_held_out
