"""params.yaml is checked before anything is opened, and all faults come at once."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.config.params import Params, Section, load_params
from pipeline.config.sections import SECTIONS
from pipeline.system.errors import InputError

ROOT = Path(__file__).parents[3]


class FruitConfig(Section):
    apples: int = Field(ge=1)
    weight_kg: float
    names: list[str] = []


class StoneConfig(Section):
    hardness: float


class BowlConfig(Section):
    pears: Literal["all"] | Annotated[int, Field(ge=1, strict=True)]


def faults(values, *kinds):
    with pytest.raises(InputError) as error:
        Params(values).check(*kinds)
    return str(error.value)


def test_a_sound_section_comes_back_typed_and_frozen():
    fruit = Params({"fruit": {"apples": 3, "weight_kg": "1e-05"}}).section(FruitConfig)  # as `dvc exp run -S` writes it
    assert fruit.weight_kg == 1e-5
    with pytest.raises(ValueError, match="frozen"):
        fruit.apples = 4


def test_a_section_is_checked_once():
    params = Params({"fruit": {"apples": 3, "weight_kg": 1}})
    params.check(FruitConfig)
    assert params.section(FruitConfig) is params.section(FruitConfig)


def test_an_unknown_key_is_named_with_the_nearest_one():
    said = faults({"fruit": {"apples": 1, "weight_kg": 1, "aples": 2}}, FruitConfig)
    assert "fruit.aples: unknown key (did you mean apples?)" in said


def test_all_faults_of_all_sections_come_at_once():
    said = faults({"fruit": {"apples": 0, "names": [1]}}, FruitConfig, StoneConfig)
    for fault in (
        "fruit.apples: input should be greater than or equal to 1, got 0",
        "fruit.weight_kg: missing",
        "fruit.names.0: input should be a valid string, got 1",
        "stone: section missing",
    ):
        assert fault in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("many", "input should be 'all' or input should be a valid integer"),
        (0, "input should be 'all' or input should be greater than or equal to 1"),
        (True, "input should be 'all' or input should be a valid integer"),
    ],
)
def test_what_fits_no_member_of_a_union_is_one_fault_in_the_files_own_words(value, what):
    said = faults({"bowl": {"pears": value}}, BowlConfig)
    assert said == f"params.yaml: bowl.pears: {what}, got {value!r}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None])
def test_what_is_no_number_is_refused(value):
    assert "fruit.weight_kg" in faults({"fruit": {"apples": 1, "weight_kg": value}}, FruitConfig)


def test_a_top_level_key_that_nothing_reads_is_named():
    assert Params({"fruits": {}}).unknown_sections(FruitConfig) == ["fruits: unknown section (did you mean fruit?)"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words", "a: 1\nb: 2\na: 3\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_mapping_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"params\.yaml") as error:
        load_params(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(InputError, match="not found: run from the folder that holds it"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.security
def test_an_alias_which_a_few_lines_would_multiply_to_gigabytes_is_refused(tmp_path):  # B9
    path = tmp_path / "params.yaml"
    path.write_text("fruit:\n  names: &few [a, a]\n  more: [*few, *few]\n")
    with pytest.raises(InputError, match=r"params\.yaml is not YAML: \*few: write it out .*line 3"):
        load_params(path)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("model", "n_layer", True, "model.n_layer: should be a number"),
        ("train", "seed", False, "train.seed: should be a number"),
        ("target", "eval_interval", True, "target.eval_interval: should be a number"),
        ("model", "fold_vocab", 1, "model.fold_vocab: should be true or false"),
    ],
)
def test_true_is_no_number_and_a_number_is_not_true(section, key, value, words):
    given = load_params(ROOT / "params.yaml").values
    params = Params({**given, section: {**given[section], key: value}})
    with pytest.raises(InputError, match=words):
        params.check(*SECTIONS)
