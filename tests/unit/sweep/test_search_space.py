"""search_space: what may be searched, and the parameters of a trial."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.params import Params, load_params
from pipeline.config.sections import SweepConfig
from pipeline.sweep.search_space import as_choice, check_space, from_choice, overridden, values_of, with_values
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


def sweep_of(params, space):
    return overridden(params, {"space": yaml.safe_load(space)}).section(SweepConfig)


def test_the_committed_space_is_sound_and_holds_keys_of_three_kinds(params):
    sweep = params.section(SweepConfig)
    check_space(sweep, params)
    assert {"optim.lr", "optim.schedule", "windows.step_tokens"} <= sweep.axes.keys()


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ("{optim: {learning_rate: [0.1]}}", "sweep.space.optim.learning_rate: unknown key"),
        ("{optim: {muon_lrs: [0.1]}}", "did you mean optim.muon_lr?"),
        ("{optim: {schedule: [linear, linaer]}}", "'linaer'"),
        ("{optim: {lr: {low: -1, high: 1}}}", "sweep.space.optim.lr: input should be greater than 0, got -1"),
        ("{optim: {lr: {low: 2, high: 1}}}", "low 2 should be below high 1"),
        ("{optim: {lr: {low: 0, high: 1, log: true}}}", "has no step, and low above 0"),
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
        ("{samples: {interval_steps: [1]}}", "cannot be searched"),
        ("{windows: {step_tokens: [1000]}}", "1000 is not a whole number of windows of 128 tokens"),
    ],
)
def test_what_cannot_be_searched_is_one_line_that_names_it(params, space, complaint):
    with pytest.raises(InputError) as error:
        check_space(sweep_of(params, space), params)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faults_of_a_space_come_at_once(params):
    with pytest.raises(InputError) as error:
        check_space(sweep_of(params, "{optim: {lrr: [1.0], eps: [-1]}}"), params)
    assert "lrr" in str(error.value)
    assert "eps" in str(error.value)


def test_values_take_the_place_of_those_in_params_yaml_which_stays_as_it_is(params):
    before = yaml.safe_dump(params.values)
    changed = with_values(params, {"optim.lr": 0.5, "windows.seq_len": 64}, micro_batch_tokens=8192)
    assert changed.values["optim"]["lr"] == 0.5
    assert changed.values["windows"]["seq_len"] == 64
    assert yaml.safe_dump(params.values) == before


@pytest.mark.parametrize(
    ("step_tokens", "batch", "accumulate"),
    [(128, 1, 1), (2048, 16, 1), (4096, 32, 1), (8192, 32, 2), (12288, 32, 3), (128 * 37, 1, 37)],
)
def test_a_batch_in_tokens_is_as_few_forward_passes_as_hold_it(params, step_tokens, batch, accumulate):
    windows = with_values(params, {"windows.step_tokens": step_tokens}, micro_batch_tokens=4096).values["windows"]
    assert (windows["micro_batch_size"], windows["gradient_accumulation_steps"]) == (batch, accumulate)


def test_a_batch_in_tokens_counts_in_the_trials_own_windows(params):
    values = {"windows.step_tokens": 2048, "windows.seq_len": 64}
    assert with_values(params, values, micro_batch_tokens=4096).values["windows"]["micro_batch_size"] == 32


def test_a_runs_values_are_those_that_it_was_made_of(params):
    values = {"optim.lr": 0.25, "optim.betas": [0.8, 0.9], "windows.step_tokens": 4096}
    config = RunConfig.of(with_values(params, values, micro_batch_tokens=2048))
    assert values_of(config, list(values)) == values


def test_numbers_that_yaml_reads_as_words_are_numbers(params):
    assert sweep_of(params, "{optim: {lr: [1e-2, 2E+1, 0.5], schedule: [cosine]}}").axes == {
        "optim.lr": [0.01, 20.0, 0.5],
        "optim.schedule": ["cosine"],
    }


def test_a_value_that_contradicts_the_rest_of_params_yaml_is_named_with_its_key(params):
    with pytest.raises(InputError, match=r"sweep\.space\.windows\.seq_len 2048 is longer than model\.block_size"):
        check_space(sweep_of(params, "{windows: {seq_len: [2048]}}"), params)


def test_a_study_is_not_named_as_a_run_is(params):
    with pytest.raises(InputError, match=r"sweep.study: 16 hexadecimal digits are the name of a run"):
        overridden(params, {"study": "5b24e86fccb57c6b"}).section(SweepConfig)


def test_a_list_is_a_choice_like_any_other():
    axis = [[0.9, 0.95], [0.9, 0.99], None, True, "x"]
    assert [from_choice(axis, as_choice(value)) for value in axis] == axis
    assert isinstance(as_choice(axis[0]), str)


def test_an_override_is_checked_as_the_file_is_and_named_as_what_it_is(params):
    with pytest.raises(InputError, match=r"params\.yaml with the command line: sweep\.trials"):
        overridden(params, {"trials": "many"}).section(SweepConfig)
    with pytest.raises(InputError, match=r"sweep.trials: input should be greater than or equal to 1, got 0"):
        overridden(params, {"trials": 0}).section(SweepConfig)
    with pytest.raises(InputError, match="sweep: section missing"):
        overridden(Params({}), {"trials": 3}).section(SweepConfig)


def test_a_study_name_is_safe_as_a_folders_name(params):
    with pytest.raises(InputError, match=r"sweep\.study"):
        overridden(params, {"study": "../x"}).section(SweepConfig)


@pytest.mark.security
@pytest.mark.parametrize("given", ["postgresql://me:s3cret@host/db", "postgresql://host/db?user=me&password=s3cret"])
def test_a_password_is_refused_where_git_and_every_run_would_keep_it_and_is_not_shown(params, given):
    with pytest.raises(InputError, match=r"sweep: storage holds a password.*PGPASSWORD") as refused:
        overridden(params, {"storage": given}).section(SweepConfig)
    assert "s3cret" not in str(refused.value)
    overridden(params, {"storage": "postgresql://me@host/db"}).section(SweepConfig)
