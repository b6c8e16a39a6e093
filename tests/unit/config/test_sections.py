"""params.yaml as a whole: every section, the contradictions between them, and any content of the file."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.params import Params, load_params
from pipeline.config.sections import SECTIONS, SlurmConfig, SweepConfig, study_name
from pipeline.ops.params_check import check_params
from pipeline.system.errors import InputError
from pipeline.training.config import RUN_SECTIONS, RunConfig

COMMITTED = load_params(Path(__file__).parents[3] / "params.yaml").values


def changed(changes):
    """The committed params.yaml with other values, by dotted key."""
    values = {name: dict(section) for name, section in COMMITTED.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Params(values)


def error_of(check, *arguments):
    """The InputError that `check` raises, as one line; empty without one."""
    try:
        check(*arguments)
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (both outcomes are right)
        return str(error)
    return ""


def test_all_errors_of_the_whole_file_are_reported_at_once():
    assert set(RUN_SECTIONS) < set(SECTIONS)
    params = changed({f"{kind.section_name}.nonsense": 1 for kind in SECTIONS} | {"optim.lrr": 1, "evaluate.seed": "x"})
    del params.values["registry"]["max_target_loss"]
    params.values |= {"modle": {}, "c\nd": {}}
    errors = [f"{kind.section_name}.nonsense: unknown key" for kind in SECTIONS]
    errors += ["optim.lrr: unknown key (did you mean lr?)", "evaluate.seed: input should be a valid integer"]
    errors += ["registry.max_target_loss: missing", "modle: unknown section (did you mean model?)"]
    errors += ["c d: unknown section (known:"]
    found = error_of(check_params, params)
    assert [error for error in errors if error not in found] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.n_embd": 385}, "n_embd 385 is not divisible by n_head 8"),
        ({"windows.seq_len": 512}, "windows.seq_len 512 is longer than model.block_size 64"),
        ({"windows.order": "sorted"}, "input should be 'jittered', 'shuffled', 'sequential' or 'random', got 'sorted'"),
        ({"optim.max_epochs": 0}, "optim.max_epochs: input should be greater than 0, got 0"),
        ({"optim.max_tokens": 581723}, "optim: max_tokens is now max_epochs: divide it by the number of tokens of the"),
        ({"optim.lr": 0}, "optim.lr: input should be greater than 0, got 0"),
        ({"train.threads": 100_000}, "less than or equal to 1024"),
        ({"train.seed": 10**22}, "train.seed"),
        ({"target.rule": "validation"}, "set corpus.val_fraction above 0"),
        ({"corpus.tokenizer": "bert\n"}, "unknown tokenizer 'bert\\n' (known: gpt2, bytes, chars, bpe:N)"),
        ({"corpus.tokenizer": "bpe:10"}, "'bpe:10' is not bpe:N, in which N, the number of ids, is 258 to 65536"),
        ({"corpus.tokenizer": "bpe:10000000"}, "'bpe:10000000' is not bpe:N, in which N"),
        ({"corpus.tokenizer": "bpe:0512"}, "'bpe:0512' is not bpe:N, in which N"),
        ({"corpus.tokenizer": "chars:9"}, "chars takes no number, got 'chars:9': write chars"),
        ({"model.vocab_size": 50256}, "model.vocab_size 50256 is below the tokenizer's 50257 ids: set it to null"),
        (
            {"sweep.storage": "nonsense"},
            "sweep.storage: should be journal:///FILE, sqlite:///FILE or postgresql://USER",
        ),
        ({"sweep.storage": "sqlite://"}, "sweep.storage: should be journal:///FILE"),  # SQLite's database in memory
        ({"sweep.study": "a b"}, "sweep.study: should be a name of letters, digits and _-, got 'a b'"),
        ({"corpus.sha256": "0a"}, "corpus.sha256: should be 64 hexadecimal digits, got '0a'"),
        ({"registry.model": "a/b"}, "registry.model: should be a name of letters, digits and ._-, got 'a/b'"),
        ({"slurm.partition": "a b"}, "slurm.partition: should be the name of a partition, got 'a b'"),
        ({"model.vocab_size": 0}, "model.vocab_size: input should be greater than or equal to 1, got 0"),
    ],
)
def test_contradictions_and_values_out_of_bounds_are_reported(changes, message):
    assert message in error_of(check_params, changed(changes))


def test_keys_that_older_files_lack_have_their_defaults():
    params = changed({})
    del params.values["slurm"], params.values["sweep"]["share_devices"]
    assert error_of(check_params, params) == ""
    assert params.section(SlurmConfig).model_dump() == COMMITTED["slurm"]
    assert params.section(SweepConfig).share_devices is False
    assert Params({"slurm": None}).section(SlurmConfig) == params.section(SlurmConfig)
    del params.values["samples"]
    assert error_of(check_params, Params(params.values)) == "params.yaml: samples: section missing"


def test_the_password_of_a_storage_is_not_printed():
    for url in ("mysql://me:hunter2@host/db", "postgresql://me:hunter2@host/db"):
        found = error_of(check_params, changed({"sweep.storage": url}))
        assert "storage contains a password" in found
        assert "hunter2" not in found


def test_a_name_for_a_study_is_valid_and_distinguishes_models():
    models = ["diary", "a_b-2", "jobs", "0123456789abcdef", "chapter.1", "chapter-1", "дневник", "日記", "-x", "x"]
    names = [study_name(model) for model in models]
    assert names[:2] == models[:2]
    assert len({*names}) == len(models)
    for name in names:
        check_params(changed({"sweep.study": name}))


TENTH = 34_219  # tokens of the committed corpus


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"windows.gradient_accumulation_steps": 568}, ""),
        (
            {"windows.gradient_accumulation_steps": 569},
            "optim.max_epochs 17 of 34,219 tokens is less than one step of 582,656 tokens",
        ),
        ({"optim.warmup": 569}, ""),
        ({"optim.warmup": 570}, "optim: warmup 570 and decay 0 take 570 steps, the run has 569"),
        (
            {"optim.warmup": 500, "optim.schedule": "wsd"},
            "optim: warmup 500 and decay 0.2 take 614 steps, the run has 569",
        ),
    ],
)
def test_a_budget_that_the_text_makes_too_short_is_reported(changes, message):
    given = {"windows.micro_batch_size": 16, "optim.max_epochs": 17, **changes}
    assert error_of(RunConfig.of(changed(given)).require_length, TENTH) == message


@pytest.mark.parametrize(
    ("epochs", "n_tokens", "steps"),
    [
        (17, TENTH, 569),  # 568.09
        (8.9, TENTH, 298),  # 297.41
        (1e-6, TENTH, 0),
        (7 * 1024 / 1050, 1050, 7),  # 7 and a rounding error, which is no step
    ],
)
def test_the_steps_of_a_budget_in_epochs_are_rounded_up(epochs, n_tokens, steps):
    config = RunConfig.of(changed({"windows.micro_batch_size": 16, "optim.max_epochs": epochs}))
    assert config.optim.max_steps(config.windows, n_tokens) == steps


EXTREMES = st.sampled_from([10**400, -(10**400), 2**63, 1e308, 5e-324])
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | EXTREMES
LEAVES = NUMBERS | st.text(max_size=5) | st.dates() | st.binary(max_size=5)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LEAVES, inner, max_size=3), max_leaves=6
)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_values_of_any_type_are_accepted_or_refused_in_one_line(tmp_path_factory, data):  # B9
    values = changed({}).values
    for section in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=4, unique=True)):
        values[section][data.draw(st.sampled_from(sorted(values[section])) | LEAVES)] = data.draw(ANYTHING)
    values[data.draw(st.sampled_from(sorted(values)) | st.just("none of them"))] = data.draw(ANYTHING)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values))
    error_of(check_params, load_params(path))
