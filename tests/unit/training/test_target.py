"""The target rules: when a run meets its target, when it is evaluated, when it stops, which model is kept."""

from contextlib import closing
from dataclasses import dataclass, replace

import pytest

from pipeline.config.params import Params, load_params
from pipeline.config.sections import TargetConfig
from pipeline.data.batches import fixed_windows
from pipeline.model.evaluate import LOSSES
from pipeline.report.figures import RunReport
from pipeline.report.tables import write_tables
from pipeline.tracking.journal import EVALUATED_LOSSES, STEPS, StepRecord, evaluated, read_steps, write_lines
from pipeline.training.config import RunConfig
from pipeline.training.forecast import _evaluated_tokens, _read_tokens
from pipeline.training.progress import Progress
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
    without_end,
)
from pipeline.training.target_result import result_of

TARGET = TargetConfig(loss=0.1, rule="corpus", average_steps=3, eval_interval=None, early_stopping_patience=None)


def records(losses, **evaluated):
    """Steps with these minibatch losses; the rest are fields of a record, as pairs of a step and its value."""
    steps = [StepRecord(i, 10 * i, loss, 1.0, 0.1) for i, loss in enumerate(losses, start=1)]
    for name, pairs in evaluated.items():
        for step, loss in pairs:
            setattr(steps[step - 1], name, loss)
    return steps


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
    assert first_met(records(losses, corpus_loss=corpus), TARGET) == {**dict.fromkeys(RULES), **met}


@pytest.mark.parametrize(
    ("losses", "estimates", "due"),
    [
        ([1, 1, 1, 0.29, 0.29, 0.29], [], [6]),  # the mean of three is below three times the target
        ([8, 8, 1.1, 0.9, 0.9, 0.9], [], [5, 6]),  # or below an eighth of the first loss
        ([9] * 20, [(4, 0.8)], range(12, 21)),  # half an epoch after the only evaluation
        (
            [9] * 20,
            [(2, 0.8), (6, 0.4)],
            range(12, 21),
        ),  # it halves in four steps: two thirds of the eight to the target
        ([9] * 30, [(2, 0.4), (4, 0.4)], range(20, 31)),  # it does not fall: after an epoch
        ([9] * 40, [(2, 0.4), (4, 0.39)], range(36, 41)),  # it falls slowly: after two epochs
        ([9] * 9, [(2, 0.4), (4, 0.1001)], [8, 9]),  # the target is near: after a quarter of an epoch
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_an_evaluation_pays_when_the_target_may_have_been_reached(losses, estimates, due, complete):
    history = records(losses, **{"corpus_loss" if complete else "loss_estimate": estimates})
    first = estimates[-1][0] if estimates else 0
    pays = [n for n in range(first + 1, len(losses) + 1) if evaluation_pays(history[:n], 16, TARGET)]
    assert pays == list(due)


def held_out(*losses):
    """Records with a validation loss at every second step."""
    return records([1] * 2 * len(losses), validation_loss=[(2 * i, loss) for i, loss in enumerate(losses, start=1)])


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
    history, two = held_out(*losses), TARGET.updated(early_stopping_patience=2)
    assert is_out_of_patience(history, two) is over
    assert is_out_of_patience(history + records([1] * 100), two) is over  # steps without an evaluation do not count
    assert not is_out_of_patience(history, TARGET)


def test_the_best_step_has_the_lowest_loss_on_the_text_of_the_rule_and_is_the_first_of_equal_ones():
    corpus, validation = [(1, 3), (2, 2), (3, 1)], [(1, 5), (2, 4), (3, 4), (4, 6)]
    history = records([1] * 4, corpus_loss=corpus, validation_loss=validation, loss_estimate=[(4, 0.5)])
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


def with_rule(rule):
    params = load_params()
    return Params({**params.values, "target": {**params.values["target"], "rule": rule, "loss": 0.1}})


def test_a_new_entry_of_the_table_may_use_all_records_ends_a_run_and_is_in_its_results(monkeypatch):
    def twice(records, config):  # two evaluations in a row, any number of steps apart
        losses = [record.corpus_loss for record in records if record.corpus_loss is not None]
        return len(losses) > 1 and max(losses[-2:]) < config.loss

    monkeypatch.setitem(RULES, "twice", Rule(twice, "two evaluations below the target", "corpus_loss"))
    target = RunConfig.of(with_rule("twice")).target
    history = records([1.0] * 16, corpus_loss=[(5, 0.09), (16, 0.08)])
    assert [is_finished(history[:n], 99, target) for n in (5, 15, 16)] == [False, False, True]
    assert results_of(history, target, 100, 99, 3.3)["to_target"]["twice"] == {"steps": 16, "tokens": 160}


@pytest.mark.parametrize(
    ("target", "result"),
    [
        ({"rule": "sliding", "loss": 0.5}, (0.4, 3, True)),
        ({"rule": "sliding", "loss": 0.4}, (0.4, 3, False)),
        ({"rule": "validation", "loss": 2.0}, (1.5, 2, True)),  # the step of the kept model
        ({"rule": "batch", "loss": 0.5}, (0.6, 3, False)),
        ({"rule": "average", "loss": 0.9, "average_steps": 2}, (0.8, 3, True)),
        ({"rule": "average", "loss": 1.3, "average_steps": 4}, (1.2, 3, False)),  # too few steps
        ({"rule": "corpus", "loss": 0.5}, None),  # not measured
        ({"rule": "of another version", "loss": 0.5}, None),
        ({}, None),
    ],
)
def test_the_result_is_the_loss_of_the_target_rule(target, result):
    history = records([2.0, 1.0, 0.6], validation_loss=[(1, 1.7), (2, 1.5), (3, 1.6)], sliding_loss=[(3, 0.4)])
    found = result_of(history, target)
    assert (found and (pytest.approx(found.loss), found.step, found.is_met)) == result
    assert found is None or found.tokens == 10 * found.step
    assert result_of([], target) is None


def test_the_result_of_a_missed_target_is_that_of_the_kept_model():
    history = records([1.0] * 3, sliding_loss=[(1, 0.5), (2, 0.4), (3, 0.6)])  # the model of the second step is kept
    assert result_of(history, {"rule": "sliding", "loss": 0.1})[:2] == (0.4, 2)


def test_each_evaluated_loss_has_a_text_and_windows():
    assert LOSSES.keys() == set(EVALUATED_LOSSES)


@dataclass
class WithQuarter(StepRecord):
    """A record with one more loss of a whole text."""

    quarter_loss: float | None = evaluated()


@pytest.fixture
def quarter(monkeypatch):
    """The records of a run that met a rule for a new loss, which is added as CONTRIBUTING.md says, at step 3."""
    monkeypatch.setitem(LOSSES, "quarter_loss", ("train", lambda n, length: fixed_windows(n // 4, length)))
    rule = Rule(lambda run, config: (run[-1].quarter_loss or 1) < config.loss, "a quarter of the text", "quarter_loss")
    monkeypatch.setitem(RULES, "quarter", rule)
    EVALUATED_LOSSES.append("quarter_loss")  # a list, so that all modules see it
    losses = {2: {"quarter_loss": 0.5}, 3: {"quarter_loss": 0.01, "sliding_loss": 0.02, "corpus_loss": 0.03}}
    yield [WithQuarter(i, 100 * i, 5 / i, 1.0, 0.1, step_s=0.5, **losses.get(i, {})) for i in (1, 2, 3)]
    EVALUATED_LOSSES.remove("quarter_loss")


def test_a_new_rule_on_a_new_loss_decides_its_result_and_the_loss_is_known_everywhere(quarter, tmp_path, capsys):
    target = TARGET.updated(rule="quarter", loss=0.02)
    assert is_finished(quarter, 100, target)
    assert result_of(quarter, target.model_dump()) == (0.01, 3, 300, True)
    longer = without_end(quarter, 100, 10, False, target.updated(loss=0.001))  # no evaluation is due at its third step
    assert {name: getattr(longer, name) for name in EVALUATED_LOSSES} == dict.fromkeys(EVALUATED_LOSSES)
    reads = _read_tokens(16, 1601, 0)
    assert reads == {
        "validation_loss": 0,
        "corpus_loss": 1600,
        "sliding_loss": reads["sliding_loss"],
        "quarter_loss": 400,
    }
    each_time = target.updated(eval_interval=5)
    assert _evaluated_tokens(each_time, 100, 10, reads) == 20 * 400 + sum(reads.values())
    with closing(Progress(2, 200, 100, 0.02)) as progress:
        progress.show(quarter[2])
    assert (
        "loss 1.6667, sliding loss 0.0200, corpus loss 0.0300, quarter loss 0.0100, target" in capsys.readouterr().out
    )
    write_lines(tmp_path / STEPS, [record.line(STEPS) for record in quarter])
    write_tables(RunReport(steps := read_steps(tmp_path / STEPS), steps, {}, [1.0], {}), tmp_path)
    lines = ["step,tokens,sliding_loss,corpus_loss,quarter_loss", "2,200,,,0.5", "3,300,0.02,0.03,0.01"]
    assert (tmp_path / "checks.csv").read_text().splitlines() == lines


@pytest.mark.parametrize(("rule", "patience", "named"), [("validation", None, "rule"), ("corpus", 3, "patience is 3")])
def test_a_setting_that_needs_a_held_out_text_is_named(rule, patience, named):
    config = RunConfig.of(load_params())
    assert config.needs_held_out is None
    other = replace(config, target=TARGET.updated(rule=rule, early_stopping_patience=patience))
    assert named in other.needs_held_out
