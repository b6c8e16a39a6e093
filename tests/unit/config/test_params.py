"""params.yaml is read strictly, and all of its errors are reported at once, in one line."""

from math import nan
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.config.params import Params, Section, load_params
from pipeline.system.errors import InputError


class FruitConfig(Section):
    apples: int = Field(ge=1)
    weight_kg: float
    ripe: bool
    pears: Literal["all"] | Annotated[int, Field(ge=1, strict=True)]
    plums: int | None
    names: list[str] = []
    extra: dict[str, str | int] = {}


VALID = {"apples": 3, "weight_kg": 1.5, "ripe": True, "pears": "all", "plums": None}


def test_a_valid_section_is_typed_immutable_and_validated_once():
    params = Params({"fruit": {**VALID, "weight_kg": "1e-05"}})  # as `dvc exp run -S` writes it
    fruit = params.section(FruitConfig)
    assert fruit.weight_kg == 1e-5
    assert params.section(FruitConfig) is fruit
    with pytest.raises(ValueError, match="frozen"):
        fruit.apples = 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aples": 2}, "aples: unknown key (did you mean apples?)"),
        ({"a\nb": 2}, "a b: unknown key (known: apples, weight_kg, ripe, pears, plums, names, extra)"),
        ({"pears": 0}, "pears: input should be 'all' or greater than or equal to 1, got 0"),
        ({"pears": True}, "pears: input should be 'all' or a valid integer, got True"),
        ({"pears": [1]}, "pears: input should be 'all' or a valid integer, got [1]"),
        ({"extra": 7}, "extra: input should be a mapping, such as {key: value}, got 7"),
        ({"extra": {"a": {"b": 1}}}, "extra.a: input should be a valid string or a valid integer, got {'b': 1}"),
        ({"weight_kg": nan}, "weight_kg: input should be a finite number, got nan"),
        ({"names": [1]}, "names.0: input should be a valid string, got 1"),
        ({"apples": True}, "apples: should be a number, got True"),
        ({"plums": True}, "plums: should be a number, got True"),
        ({"ripe": 1}, "ripe: should be true or false, got 1"),
    ],
)
def test_an_invalid_value_is_reported_with_its_key(changes, message):
    with pytest.raises(InputError) as error:
        Params({"fruit": VALID | changes}).check(FruitConfig)
    assert str(error.value) == f"params.yaml: fruit.{message}"


BROKEN = ["a: [", "[" * 1000, "? [1]\n: 2\n", "a: \0", b"\xff\xfe\x00"]
BAD_VALUES = ["2001-99-99", "!!int ''", "!!bool x", "!!timestamp x", "!!float z", "1" + "0" * 5000, "!!python/tuple []"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found: run from the project folder"),
        ("- a\n- b\n", "contains no sections: expected a mapping, got list"),
        ("# nothing\n", "contains no sections: it is empty"),
        ("just words", "contains no sections: expected a mapping, got str"),
        ("a: 1\nb: 2\na: 3\n", "is not YAML: a appears twice"),
        # an alias, which a few lines would multiply to gigabytes
        ("fruit:\n  names: &few [a, a]\n  more: [*few, *few]\n", r"is not YAML: \*few: write it out .*line 3"),
        *((content, "is not YAML") for content in BROKEN),
        *((f"a: {value}", "is not YAML") for value in BAD_VALUES),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused_in_one_line(tmp_path, content, message):  # B9
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"^.*params\.yaml {message}.*$"):
        load_params(path)
