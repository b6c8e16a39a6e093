import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser  # what `dvc exp run -S` parses with
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe, as_set, find_recipe, list_recipes
from pipeline.config.sections import CorpusConfig, SweepConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.sweep.search_space import check_space
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig
from pipeline.training.optim import lr_factor

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes"


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """A copy of the committed params.yaml."""
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def recipe(folder: Path, text: str) -> str:
    """A recipe of the test's own, by path."""
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def settings_of(name: str, params: Path) -> tuple[RunConfig, CorpusConfig]:
    """What a run of a recipe reads, on top of the committed default."""
    apply_recipe(name, params, RECIPES)
    return RunConfig.of(load_params(params)), load_params(params).section(CorpusConfig)


def keys(values: dict, prefix: str = "") -> set[str]:
    nested = [
        keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key} for key, value in values.items()
    ]
    return set().union(*nested)


def value_of(values: dict, key: str) -> object:
    section, _, rest = key.partition(".")
    return value_of(values[section], rest) if rest else values[section]


def test_the_committed_params_are_the_recipe_laptop(params):
    before = params.read_bytes()
    assert apply_recipe("laptop", params, RECIPES).endswith("has the values of recipe laptop already")
    assert params.read_bytes() == before


@pytest.mark.parametrize("name", sorted(set(list_recipes(RECIPES)) - {"laptop"}))
def test_laptop_takes_back_all_that_another_recipe_sets(name, params):
    before = params.read_bytes()
    apply_recipe(name, params, RECIPES)
    assert params.read_bytes() != before
    apply_recipe("laptop", params, RECIPES)
    assert params.read_bytes() == before


def test_a_recipe_takes_back_what_another_one_set(params):
    apply_recipe("gpt2-124m", params, RECIPES)
    straight = params.read_bytes()
    apply_recipe("seed-001", params, RECIPES)  # another optimiser, schedule, rule, split
    apply_recipe("gpt2-124m", params, RECIPES)
    assert params.read_bytes() == straight


def test_a_recipe_of_the_users_own_sets_its_own_keys_alone(params):
    apply_recipe("seed-000", params, RECIPES)
    assert (
        apply_recipe(recipe(params.parent, "optim:\n  lr: 1.0e-4\n"), params, RECIPES) == "optim.lr: 3.0e-4 -> 1.0e-4"
    )


def test_laptop_sets_exactly_the_keys_in_which_recipes_differ():
    recipes = {name: yaml.safe_load(find_recipe(name, RECIPES).read_text()) for name in list_recipes(RECIPES)}
    assert keys(recipes.pop("laptop")) == set().union(*(keys(values) for values in recipes.values()))


@pytest.mark.parametrize("name", list(list_recipes(RECIPES)))
def test_every_recipe_gives_valid_params(name, params):
    config, corpus = settings_of(name, params)
    check_space(load_params(params).section(SweepConfig), load_params(params))
    assert bool(corpus.val_fraction) is bool(config.needs_held_out)


@pytest.mark.parametrize("name", list(list_recipes(RECIPES)))
def test_only_values_change(name, params):
    before = params.read_text().splitlines()
    changes = apply_recipe(name, params, RECIPES)
    after = params.read_text().splitlines()
    assert len(after) == len(before)
    differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(differing) == (0 if "already" in changes else len(changes.splitlines()))
    for old, new in differing:
        assert old.partition(":")[0] == new.partition(":")[0]
        assert old.partition(" #")[2] == new.partition(" #")[2]


def test_a_value_is_copied_as_it_is_written(params):
    own = recipe(params.parent, "optim:\n  eps: 1.0e-9 # small\n  max_grad_norm: null\n  betas: [0.9, 0.950]\n")
    assert apply_recipe(own, params) == "optim.eps: 1.0e-8 -> 1.0e-9\noptim.max_grad_norm: 1.0 -> null"
    assert "\n  eps: 1.0e-9\n" in params.read_text()
    assert "\n  betas: [0.9, 0.95] # of AdamW\n" in params.read_text()  # the same value, so not touched


def test_a_step_differs_from_a_share(params):
    own = recipe(params.parent, "optim: {warmup: 1, initial_lr: 0}")  # 0.0 by now
    assert "optim.initial_lr: 0.0 -> 0" in apply_recipe(own, params)


def test_lists_on_lines_of_their_own_and_a_missing_value_are_replaced(params):
    """`dvc exp run -S` writes lists and null so."""
    params.write_text(
        "optim:\n  betas:    # of AdamW\n  - 0.8\n  - 0.99\n  # the next\n  max_grad_norm:     # none\n  one:\n  - 1\n"
    )
    own = recipe(params.parent, "optim:\n  betas: [0.9, 0.95]\n  max_grad_norm: 1.0\n  one: [2]\n")
    assert apply_recipe(own, params).splitlines() == [
        "optim.betas: - 0.8 - 0.99 -> [0.9, 0.95]", "optim.max_grad_norm: null -> 1.0", "optim.one: - 1 -> [2]",
    ]  # fmt: skip
    assert load_params(params).values == {"optim": {"betas": [0.9, 0.95], "max_grad_norm": 1.0, "one": [2]}}
    assert params.read_text().startswith("optim:\n  betas:    # of AdamW\n    [0.9, 0.95]\n  # the next\n")
    assert params.read_text().endswith("  max_grad_norm: 1.0     # none\n  one:\n    [2]\n")


def test_an_unknown_recipe_is_answered_with_the_nearest_and_all():
    with pytest.raises(InputError, match=r"no recipe latop \(did you mean laptop\?\): .*recipes holds .*laptop.*smoke"):
        find_recipe("latop", RECIPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"own.yaml: optim.lrr: no such key in .*params.yaml \(did you mean optim.lr\?\)"),
        ("optim: 3", "optim: no such key"),
        ("optim: {lr: {peak: 1}}", "optim.lr.peak: no such key"),
        ("optim:\n  betas:\n  - 0.9\n  - 0.99\n", "optim.betas: write the value on one line"),
        ("- optim", "holds no sections"),
        ("optim: {", "is not YAML"),
    ],
)
def test_a_bad_recipe_changes_nothing(text, message, params):
    before = params.read_bytes()
    with pytest.raises(InputError, match=message):
        apply_recipe(recipe(params.parent, text), params)
    assert params.read_bytes() == before


def test_recipes_are_listed_with_the_first_line_of_their_comment():
    listed = list_recipes(RECIPES)
    assert {"laptop", "smoke"} <= set(listed)
    assert listed["smoke"].startswith("The whole pipeline in about 20 seconds of work")
    assert all(listed.values())


def parsed(arguments: str) -> dict:
    """What `dvc exp run` understands."""
    words = shlex.split(arguments)
    assert words[::2] == ["-S"] * (len(words) // 2)
    overrides = OverridesParser.create().parse_overrides(words[1::2])
    return {override.key_or_group: override.value() for override in overrides}


def test_smoke_as_arguments_says_what_its_file_says_and_else_what_laptop_says():
    laptop, smoke = (yaml.safe_load(find_recipe(name, RECIPES).read_text()) for name in ("laptop", "smoke"))
    expected = {key: value_of(values, key) for values in (laptop, smoke) for key in keys(values)}
    assert parsed(as_set("smoke", RECIPES)) == expected


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=9), max_size=3),
        st.sampled_from(
            ["null", "a: b", "it's", 'say "so"', "back\\", '\\"', "a\nb", "$HOME `x`", "1e-3", "", "naïve"]
        ),
    )
)
def test_any_value_survives_shell_and_dvc(tmp_path_factory, value):
    own = recipe(tmp_path_factory.getbasetemp(), yaml.safe_dump({"a": {"b": value}}, allow_unicode=True))
    assert parsed(as_set(own)) == {"a.b": value}


PUBLISHED = {path.stem: path for path in sorted((ROOT / "benchmarks" / "published").glob("seed-*.csv"))}


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("seed-000", 124_439_808),
        ("seed-002", 124_439_808),
        ("seed-003", 124_475_904),  # its vocabulary is padded to 50,304
        ("seed-004", 124_439_808),
        ("gpt2-124m", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_a_recipe_has_exactly_the_parameters_of_its_gpt2(name, n_params, params):
    model = settings_of(name, params)[0].model
    with torch.device("meta"):
        gpt = GPT(model, Vocabulary.full(model.vocab_size))
    assert sum(parameter.numel() for parameter in gpt.parameters()) == model.n_params == n_params


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_system_sees_as_many_tokens_a_step_as_it_printed(name, params):
    config, corpus = settings_of(name, params)
    points = pd.read_csv(PUBLISHED[name])
    assert ((points["step"] + 1) * config.windows.step_tokens == points["tokens"]).all()
    assert config.optim.max_tokens >= points["tokens"].max()
    assert corpus.fraction == 1.0
    assert not config.model.fold_vocab
    assert config.optim.name == "adamw"


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"seed-000"}))
def test_a_published_system_has_the_learning_rates_that_it_printed(name, params):
    """Its step s is our step s + 1. Whether its schedule counts from 0 or from 1 differs from one to the next, so each
    rate may be off by as much as it changes in one step, and by what printing rounded off."""
    config, _ = settings_of(name, params)
    total = config.optim.max_steps(config.windows)
    printed = pd.read_csv(PUBLISHED[name], dtype={"lr": str}).dropna(subset="lr")
    assert len(printed)
    for step, text in zip(printed["step"], printed["lr"], strict=True):
        ours = [
            config.optim.lr * lr_factor(max(1, min(s, total)), total, config.optim) for s in (step, step + 1, step + 2)
        ]
        one_step = max(abs(ours[1] - ours[0]), abs(ours[2] - ours[1]))
        digits = len(text.partition(".")[2]) if "e" not in text else 0
        rounded = 10.0 ** -max(6, digits)
        assert abs(ours[1] - float(text)) <= one_step + rounded, f"step {step}: {ours[1]:.4g}, printed {text}"


def test_seed_000_has_one_rate_throughout(params):
    optim = settings_of("seed-000", params)[0].optim
    assert {optim.lr * lr_factor(step, 10_000, optim) for step in (1, 2, 500, 7828, 10_000)} == {3e-4}


def test_the_published_stop_rules_are_theirs(params):
    targets = {name: settings_of(name, params)[0].target for name in sorted(PUBLISHED)}
    assert [(t.rule, t.loss) for t in targets.values()] == [
        ("batch", 0.0999999), ("validation", 0.1), ("batch", 0.0999), ("batch", 0.1), ("average", 0.099999),
    ]  # fmt: skip
    assert targets["seed-004"].average_steps == 100
    assert (targets["seed-001"].eval_interval, targets["seed-001"].early_stopping_patience) == (25, 20)
