"""The search space: which keys and values are allowed, and the parameters of a trial."""

import copy
from pathlib import Path

import pytest
import yaml

from pipeline.config.params import Params, load_params
from pipeline.config.sections import SweepConfig
from pipeline.sweep.search_space import as_choice, check_space, from_choice, values_of, with_values
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def params():
    return load_params(ROOT / "params.yaml")


def sweep_of(params, space):
    return params.overridden(SweepConfig, {"space": yaml.safe_load(space)}).section(SweepConfig)


def test_the_committed_space_is_valid_and_has_keys_of_three_kinds(params):
    sweep = params.section(SweepConfig)
    check_space(sweep, params)
    assert {"optim.lr", "optim.schedule", "windows.step_tokens"} <= sweep.axes.keys()


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ("{optim: {schedule: [linear, linaer]}}", "'linaer'"),
        ("{optim: {lr: {low: -1, high: 1}}}", "sweep.space.optim.lr: input should be greater than 0, got -1"),
        ("{optim: {lr: {low: 2, high: 1}}}", "low 2 should be below high 1"),
        ("{optim: {lr: {low: 0, high: 1, log: true}}}", "must have low above 0 and no step"),
        ("{optim: {lr: {low: 0.1, high: 1, lgo: true}}}", "lgo"),
        ("{optim: {lr: {low: .nan, high: 1}}}", "finite"),
        ("{optim: {lr: []}}", "a list of choices"),
        ("{optim: {lr: [0.1, 0.2, 1e-1]}}", "sweep.space.optim.lr: has 0.1 twice"),
        ("{optim: {lr: 0.1}}", "sweep.space.optim.lr: should be {low: ..., high: ...} or a list of choices, got 0.1"),
        ("{optim: {lr: {low: 1}}}", "sweep.space.optim.lr: high field required"),
        ("{windows: {skip_below: [2.0], count_skipped: [false]}}", "unknown key"),
        ("{optim: 3}", "sweep.space.optim"),
        ("{}", "sweep.space"),
        ("{target: {loss: [0.1, 10.0]}}", "sweep.space.target.loss: cannot be searched"),
        ("{model: {init: [hf://gpt2, hf://gpt2-medium]}}", "sweep.space.model.init: cannot be searched"),
        ("{windows: {step_tokens: [1000]}}", "1000 is not a whole number of windows of 64 tokens"),
        ("{windows: {step_tokens: [2k]}}", "windows.step_tokens: input should be a valid integer, got '2k'"),
        ("{windows: {step_tokens: [null]}}", "got None"),
        ("{windows: {step_tokens: {low: 2048, high: 4096.5}}}", "got 4096.5"),
        ("{windows: {seq_len: [2048]}}", "sweep.space.windows.seq_len 2048 is longer than model.block_size"),
        ("{optim: {max_tokens: {low: 5, high: 9}}}", "max_tokens: unknown key (did you mean optim.max_epochs?)"),
        ("{optim: {lrr: [1.0], eps: [-1]}}", "lrr: unknown key (did you mean optim.lr?); sweep.space.optim.eps"),
    ],
)
def test_what_cannot_be_searched_is_named_in_one_line(params, space, complaint):
    with pytest.raises(InputError) as error:
        check_space(sweep_of(params, space), params)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_fits_into_no_run_on_the_text_is_named_once_the_text_is_tokenized(params):
    sweep = sweep_of(params, "{optim: {warmup: [10, 1000], max_epochs: {low: 0.01, high: 9.5}}}")
    check_space(sweep, params)
    with pytest.raises(InputError) as error:
        check_space(sweep, params, n_tokens=34_219)
    assert str(error.value).partition(": ")[2] == (
        "sweep.space.optim: warmup 1000 and decay 0 take 1000 steps, the run has 234; "
        "sweep.space.optim.max_epochs 0.01 of 34,219 tokens is less than one step of 2,048 tokens"
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"trials": "many"}, "params.yaml with the command line: sweep.trials"),
        ({"study": "5b24e86fccb57c6b"}, "sweep.study: 16 hexadecimal digits are the fingerprint of a run"),
        ({"study": "../x"}, "sweep.study"),  # it is the name of a folder
        ({"storage": "postgresql://me:s3cret@host/db"}, "sweep: storage contains a password"),
        ({"storage": "postgresql://host/db?user=me&password=s3cret"}, "PGPASSWORD"),
    ],
)
def test_values_of_the_command_line_are_checked_and_a_password_is_not_shown(params, given, complaint):
    with pytest.raises(InputError) as error:
        params.overridden(SweepConfig, given).section(SweepConfig)
    assert complaint in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_storage_without_a_password_is_accepted_and_a_missing_section_is_not(params):
    params.overridden(SweepConfig, {"storage": "postgresql://me@host/db"}).section(SweepConfig)
    with pytest.raises(InputError, match="sweep: section missing"):
        Params({}).overridden(SweepConfig, {"trials": 3}).section(SweepConfig)


@pytest.mark.parametrize(
    ("step_tokens", "batch", "accumulate"),
    [(128, 1, 1), (2048, 16, 1), (4096, 32, 1), (8192, 32, 2), (12288, 32, 3), (128 * 37, 1, 37)],
)
def test_a_batch_in_tokens_is_split_into_as_few_micro_batches_as_possible(params, step_tokens, batch, accumulate):
    values = {"windows.step_tokens": step_tokens, "windows.seq_len": 128}
    windows = with_values(params, values, micro_batch_tokens=4096).values["windows"]
    assert (windows["micro_batch_size"], windows["gradient_accumulation_steps"]) == (batch, accumulate)


def test_a_trials_values_replace_those_of_params_yaml_and_are_found_again(params):
    before = copy.deepcopy(params.values)
    values = {"optim.lr": 0.25, "optim.betas": [0.8, 0.9], "windows.seq_len": 64, "windows.step_tokens": 2048}
    changed = with_values(params, values, micro_batch_tokens=4096)
    assert changed.values["windows"]["micro_batch_size"] == 32  # of the trial's own 64 tokens
    assert values_of(RunConfig.of(changed), list(values)) == values
    assert params.values == before


def test_choices_may_be_lists_and_numbers_that_yaml_reads_as_words(params):
    sweep = sweep_of(params, "{optim: {lr: [1e-2, 2E+1, 0.5], schedule: [cosine]}}")
    assert sweep.axes == {"optim.lr": [0.01, 20.0, 0.5], "optim.schedule": ["cosine"]}
    axis = [[0.9, 0.95], [0.9, 0.99], None, True, "x"]
    assert [from_choice(axis, as_choice(value)) for value in axis] == axis
    assert isinstance(as_choice(axis[0]), str)
