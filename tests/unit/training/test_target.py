"""The target rules, and when an evaluation is due."""

import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.config.params import Params, load_params
from pipeline.config.sections import TargetConfig
from pipeline.system.errors import InputError
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


def records(losses, corpus=(), held_out=()):
    """Steps with these losses, some with the loss of a whole text: pairs of step and loss."""
    return [
        StepRecord(i, 10 * i, loss, 1.0, 0.1, corpus_loss=dict(corpus).get(i), validation_loss=dict(held_out).get(i))
        for i, loss in enumerate(losses, start=1)
    ]


def test_batch_is_met_by_one_lucky_minibatch():
    assert first_met(records([1, 0.09, 0.5]), TARGET)["batch"] == 2


def test_average_needs_its_full_number_of_minibatches():
    assert not RULES["average"].is_met(records([0.01, 0.01]), TARGET)
    assert first_met(records([0.5, 0.2, 0.1, 0.09, 0.05]), TARGET)["average"] == 5


def test_corpus_is_met_by_an_evaluation_alone():
    history = records([0.01, 0.01, 0.01, 0.01], corpus=[(2, 0.11), (4, 0.09)])
    assert first_met(history, TARGET) == {"batch": 1, "average": 3, "corpus": 4, "validation": None}


def test_the_target_itself_is_not_below_the_target():
    assert not RULES["batch"].is_met(records([0.1]), TARGET)


def test_what_was_not_reached_is_none():
    assert set(first_met(records([5, 4]), TARGET).values()) == {None}


def test_the_first_evaluation_is_due_when_the_running_mean_is_near():
    assert not evaluation_pays(records([1, 1, 1, 0.1]), 10, TARGET)  # mean of the last three .7
    assert evaluation_pays(records([1, 0.29, 0.29, 0.29]), 10, TARGET)


def test_an_evaluation_sets_the_next_to_when_the_mean_has_fallen_by_what_is_missing():
    seen = records([0.3, 0.3, 0.3, 0.19, 0.2, 0.2], corpus=[(3, 0.15)])  # .15 has to fall by a third, so has the mean
    assert evaluation_pays(seen, 100, TARGET)
    assert not evaluation_pays(records([0.3, 0.3, 0.3, 0.2, 0.2, 0.21], corpus=[(3, 0.15)]), 100, TARGET)


def test_an_evaluation_is_due_an_epoch_after_the_last_one():
    seen = records([0.2] * 8, corpus=[(3, 0.2)])
    assert evaluation_pays(seen, 5, TARGET)
    assert not evaluation_pays(seen[:-1], 5, TARGET)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 100])
def test_no_evaluation_pays_before_there_is_a_mean(steps_per_epoch):
    assert not evaluation_pays([], steps_per_epoch, TARGET)


def evaluated(*losses):
    """Records with a validation loss at every second step."""
    return records([1] * 2 * len(losses), held_out=[(2 * i, loss) for i, loss in enumerate(losses, start=1)])


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
def test_patience_counts_the_evaluations_since_the_lowest_held_out_loss(losses, over):
    assert is_out_of_patience(evaluated(*losses), TARGET.updated(early_stopping_patience=2)) is over


def test_steps_without_an_evaluation_cost_no_patience():
    history = evaluated(5, 6) + records([1] * 100)
    assert not is_out_of_patience(history, TARGET.updated(early_stopping_patience=2))


def test_without_patience_given_no_loss_ends_a_run():
    assert not is_out_of_patience(evaluated(*range(1, 100)), TARGET)


def test_the_best_step_is_by_the_text_of_the_rule_and_the_first_of_equals():
    history = records([1] * 4, corpus=[(1, 3), (2, 2), (3, 1)], held_out=[(1, 5), (2, 4), (3, 4), (4, 6)])
    assert best_step(history, TARGET) == best_step(history, TARGET.updated(rule="batch")) == 3
    assert best_step(history, TARGET.updated(rule="validation")) == 2
    assert best_step(records([1]), TARGET) is None


def test_fixed_evaluations_come_at_their_steps_alone():
    fixed = TARGET.updated(eval_interval=4)
    low = records([0.01] * 9)  # where an evaluation would pay at each step
    assert [n for n in range(1, 10) if evaluation_is_due(low[:n], 3, True, fixed)] == [4, 8]


def test_a_held_out_text_is_evaluated_after_each_epoch():
    assert [n for n in range(1, 10) if evaluation_is_due(records([9] * n), 3, True, TARGET)] == [3, 6, 9]
    assert not any(evaluation_is_due(records([9] * n), 3, False, TARGET) for n in range(1, 10))


def test_the_training_text_is_measured_where_something_hangs_on_it():
    fixed = TARGET.updated(rule="validation", eval_interval=2)
    lower, higher = evaluated(5, 6, 4), evaluated(5, 6, 5.5)
    assert needs_corpus_loss(lower, fixed)
    assert not needs_corpus_loss(higher, fixed)
    assert needs_corpus_loss(higher, fixed.updated(eval_interval=None))  # the next look is set by it
    assert needs_corpus_loss(higher, fixed.updated(rule="corpus"))


def test_a_rule_that_is_added_to_the_table_ends_a_run_and_is_in_its_results(monkeypatch):
    toy = Rule(lambda records, config: records[-1].grad_norm < config.loss, description="a small gradient")
    monkeypatch.setitem(RULES, "gradient", toy)
    target = RunConfig.of(with_rule("gradient")).target
    history = records([5, 4, 3])
    history[-1].corpus_loss, history[1].grad_norm = 2.5, 0.01
    assert [is_finished(history[:n], 9, target) for n in (1, 2)] == [False, True]
    assert results_of(history, target, 100)["to_target"]["gradient"] == {"steps": 2, "tokens": 20}


def test_a_rule_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(
        InputError, match=r"^params.yaml: target.rule: unknown value 'corpse' \(did you mean corpus\?\)$"
    ):
        RunConfig.of(with_rule("corpse"))


def with_rule(rule):
    params = load_params()
    return Params({**params.values, "target": {**params.values["target"], "rule": rule}})


@pytest.mark.parametrize(("rule", "patience", "named"), [("validation", None, "rule"), ("corpus", 3, "patience is 3")])
def test_what_needs_a_held_out_text_is_named(rule, patience, named):
    config = RunConfig.of(load_params())
    assert config.needs_held_out is None
    other = replace(config, target=TARGET.updated(rule=rule, early_stopping_patience=patience))
    assert named in other.needs_held_out


def test_params_are_checked_without_torch_and_pandas():
    names = "pipeline.training.config, pipeline.tracking.fingerprint, pipeline.tracking.journal"
    program = f"import sys, {names}; sys.exit(bool({{'torch', 'pandas'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_a_rule_may_use_all_records_of_a_run(monkeypatch):
    """A rule that needs two evaluations in a row below the target, which may be any number of steps apart."""

    def twice(records, config):
        losses = [record.corpus_loss for record in records if record.corpus_loss is not None]
        return len(losses) > 1 and max(losses[-2:]) < config.loss

    monkeypatch.setitem(RULES, "twice", Rule(twice, "two evaluations below the target"))
    history = records([1.0] * 20)
    history[4].corpus_loss, history[15].corpus_loss = 0.09, 0.08
    assert first_met(history, TARGET.updated(average_steps=2))["twice"] == 16
