"""params.yaml as a whole: every section, the contradictions between them, and any content of the file."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.params import Params, load_params
from pipeline.config.sections import SECTIONS
from pipeline.data.tokenizer import TOKENIZERS
from pipeline.ops.params_check import check_params
from pipeline.system.errors import InputError
from pipeline.training.config import RUN_SECTIONS, RunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def values():
    """Those of the committed params.yaml, to be changed."""
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def require_a_line(check, *arguments):
    """Return the faults that `check` names in one line; nothing where it finds none. Fail on any other error."""
    try:
        check(*arguments)
    except InputError as error:
        assert error.exit_code == 2  # noqa: PT017 (either outcome is right)
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return str(error)
    return ""


def test_all_faults_of_the_whole_file_are_named_at_once(values):
    values["optim"]["lrr"] = 1
    values["corpus"]["fraction"] = 2
    values["evaluate"]["seed"] = "x"
    del values["registry"]["max_target_loss"]
    values["modle"] = {}
    said = require_a_line(check_params, Params(values))
    for fault in ("optim.lrr: unknown key (did you mean lr?)", "corpus.fraction", "evaluate.seed",
                  "registry.max_target_loss: missing", "modle: unknown section (did you mean model?)"):  # fmt: skip
        assert fault in said


def test_a_rule_that_has_nothing_to_go_by_is_named(values):
    values["target"]["rule"] = "validation"
    assert "set corpus.val_fraction above 0" in require_a_line(check_params, Params(values))


def test_an_unknown_tokenizer_is_refused_with_the_known_ones(values):
    values["corpus"]["tokenizer"] = "bert\n"
    said = require_a_line(check_params, Params(values))
    assert said == f"params.yaml: corpus.tokenizer: unknown tokenizer 'bert\\n' (known: {', '.join(TOKENIZERS)})"


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates(), st.binary(max_size=5),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, 5e-324]),
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | LEAVES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_values_of_any_type_are_accepted_or_refused_in_a_line(tmp_path_factory, data):  # B9
    values = {name: dict(section) for name, section in load_params(ROOT / "params.yaml").values.items()}
    for section in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=4, unique=True)):
        key = data.draw(
            st.sampled_from(sorted(values[section])) | ANYTHING.filter(lambda key: hash_of(key) is not None)
        )
        values[section][key] = data.draw(ANYTHING)
    if data.draw(st.booleans()):
        values[data.draw(st.sampled_from(sorted(values)) | st.text(max_size=5))] = data.draw(ANYTHING)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values))
    require_a_line(check_params, load_params(path))


def hash_of(key):
    try:
        return hash(key)
    except TypeError:
        return None


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_each_of_several_wrong_values_is_named_by_section_and_key(data):  # B9
    values = {name: dict(section) for name, section in load_params(ROOT / "params.yaml").values.items()}
    stage = data.draw(st.sampled_from([RUN_SECTIONS, *((kind,) for kind in set(SECTIONS) - set(RUN_SECTIONS))]))
    keys = [(kind.section_name, key) for kind in stage for key in kind.model_fields]
    wrong = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5, unique=True))
    for section, key in wrong:
        values[section][key] = {"no": {"such": "thing"}}  # of no section's types
    said = require_a_line(Params(values).check, *stage)
    assert all(f"{section}.{key}" in said for section, key in wrong)


SCRAPS = st.text("&*!{}[]:,-?<|>'\"%@`#a1 \n.~=e", max_size=40).map(str.encode)


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=60) | SCRAPS)
def test_any_bytes_as_params_are_read_or_refused_in_a_line(tmp_path_factory, content):  # B9
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    if not require_a_line(load_params, path):
        require_a_line(check_params, load_params(path))


@pytest.mark.parametrize(
    "content",
    ["[" * 5000, "a: 2001-99-99", "a: !!int ''", "a: !!bool x", "a: !!timestamp x", "a: !!float z", "a: 1" + "0" * 5000,
     "a: !!python/object:os.system {}", "? [1]\n: 2\n", "a: \0"],
)  # fmt: skip
def test_what_only_yaml_itself_stumbles_over_is_refused_in_a_line(tmp_path, content):  # B9
    (tmp_path / "params.yaml").write_text(content)
    assert "is not YAML" in require_a_line(load_params, tmp_path / "params.yaml")


def test_a_key_with_a_line_break_is_named_in_one_line():
    params = Params({"corpus": {"a\nb": 1}, "c\nd": {}})
    assert "corpus.a b: unknown key" in require_a_line(params.check, *SECTIONS)
    assert params.unknown_sections(*SECTIONS)[0].startswith("c d: unknown section")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_embd": 385}, "n_embd 385 is not divisible by n_head 6"),
        ({"windows.seq_len": 512}, "windows.seq_len 512 is longer than model.block_size 128"),
        ({"optim.warmup": 1000}, "take 1000 steps, the run has 149"),
        ({"windows.gradient_accumulation_steps": 10**9}, "is less than one step of"),
        ({"train.threads": 100_000}, "less than or equal to 1024"),
        ({"train.threads": 0}, "greater than or equal to 1"),
        ({"train.seed": 10**22}, "train.seed"),
        ({"model.n_layer": 10**8}, "less than or equal to 1000"),
        ({"optim.lr": 0}, "optim.lr: input should be greater than 0, got 0"),
        (
            {"windows.order": "sorted"},
            "windows.order: input should be 'shuffled', 'sequential' or 'random', got 'sorted'",
        ),
    ],
)
def test_contradictions_are_named(changes, words):
    values = {name: dict(section) for name, section in load_params(ROOT / "params.yaml").values.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    with pytest.raises(InputError) as error:
        RunConfig.of(Params(values))
    assert words in str(error.value)


def test_every_section_of_a_run_is_among_the_checked():
    assert set(RUN_SECTIONS) < set(SECTIONS)
