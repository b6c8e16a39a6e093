"""Recipes change only the values of params.yaml, and those of published systems agree with their logs."""

import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser  # what `dvc exp run -S` parses with

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe, as_set, changed_keys, find_recipe, list_recipes, write_values
from pipeline.config.sections import CorpusConfig, RegistryConfig
from pipeline.ops.params_check import check_params
from pipeline.system.errors import InputError
from pipeline.tracking.fingerprint import flatten
from pipeline.training.config import RunConfig
from pipeline.training.optim import lr_factor

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes"
NAMES = list(list_recipes(RECIPES))
PUBLISHED = {path.stem: pd.read_csv(path, dtype={"lr": str}) for path in (ROOT / "benchmarks/published").glob("*.csv")}


# Tokens of the training text that a recipe is for, and the steps of its budget there.
STEPS = {
    "laptop-swept": (34_219, 223),
    "laptop-full": (338_025, 991),
    "smoke": (1568, 300),
    **dict.fromkeys(("gpt2-124m", "gpt2-124m-cpu", "gpt2-medium", "gpt2-large"), (338_025, 743)),
    "gpt2-xl": (338_025, 1321),
    "shakespeare-char-cpu": (1_003_836, 458),  # in characters
    "shakespeare-char": (1_003_836, 1471),
    "finetune-gpt2": (301_962, 20),  # as in nanoGPT's configuration
    "seed-000": (338_025, 10_000),
    "seed-001": (301_962, 2000),  # a tenth is held out
    "seed-002": (338_025, 26_500),
    "seed-003": (338_025, 2000),
    "seed-004": (338_025, 20_000),
}


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """A copy of the committed params.yaml."""
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def own_recipe(folder: Path, text: str) -> str:
    """The path of a recipe that is not in recipes/."""
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_keys_with_a_default_may_be_missing_in_an_older_file_until_another_value_is_to_be_written(params):
    lines = params.read_text().splitlines(keepends=True)
    params.write_text("".join(line for line in lines if not line.startswith(("  init:", "  freeze:"))))
    assert "model.n_layer: 2 -> 3" in apply_recipe("laptop-full", params, RECIPES)
    assert changed_keys({"model.init": None, "train.freeze": 0, "optim.lr": 0.1}, params) == ["optim.lr"]
    before = params.read_bytes()
    with pytest.raises(InputError, match=r"params.yaml has no model.init: add `init: hf://gpt2` to its section model"):
        changed_keys({"model.init": "hf://gpt2"}, params)
    with pytest.raises(InputError, match="no such key"):
        apply_recipe("finetune-gpt2", params, RECIPES)
    assert params.read_bytes() == before


def test_a_name_in_any_script_is_written_and_printed_as_it_is(params):
    for name in ("日记", "ไดอารี่", "يوميات", "Größe"):
        assert write_values({"registry.model": name}, params).endswith(f" -> {name}")
        assert f"  model: {name} " in params.read_text(encoding="utf-8")
        assert load_params(params).values["registry"]["model"] == name


def test_a_search_space_of_other_keys_stays(params):
    before = params.read_text()
    own = before.replace(
        "      lr: {low: 0.002, high: 0.02, log: true}\n", "      lr: [0.1, 0.2]\n      eps: [1.0e-8]\n"
    )
    for text in (own, before[: before.index("  space: #")] + "  space: {}\n"):
        params.write_text(text)
        assert "model.n_layer: 2 -> 6" in apply_recipe("seed-001", params, RECIPES)
        apply_recipe("laptop", params, RECIPES)
        assert params.read_text() == text
        assert changed_keys({"sweep.space.optim.lr.low": 0.1}, params) == []


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"laptop"}))
def test_a_recipe_changes_only_values_which_are_valid_and_laptop_resets_them(name, params):
    before = params.read_text()
    changes = apply_recipe(name, params, RECIPES)
    after = params.read_text()
    lines = [(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert 0 < len(lines) <= len(changes.splitlines())  # the ends of a range are on one line
    for old, new in lines:
        assert old.partition(":")[0] == new.partition(":")[0]
        assert old.partition(" #")[2] == new.partition(" #")[2]
    check_params(load_params(params))
    config, (n_tokens, steps) = RunConfig.of(load_params(params)), STEPS[name]
    config.require_length(n_tokens)
    assert config.optim.max_steps(config.windows, n_tokens) == steps
    held_out = load_params(params).section(CorpusConfig).val_fraction
    assert bool(held_out) is bool(config.needs_held_out)
    if config.target.rule == "sliding":  # else the recipe could make no champion
        assert config.target.loss <= load_params(params).section(RegistryConfig).max_target_loss
    apply_recipe("laptop", params, RECIPES)
    assert params.read_text() == before
    assert apply_recipe("laptop", params, RECIPES).endswith("already has the values of recipe laptop")


def test_line_ends_are_kept(params):
    before = params.read_bytes()
    apply_recipe("seed-001", params, RECIPES)
    expected = params.read_bytes().replace(b"\n", b"\r\n")
    params.write_bytes(before.replace(b"\n", b"\r\n"))
    apply_recipe("seed-001", params, RECIPES)
    assert params.read_bytes() == expected


def test_a_recipe_resets_the_keys_of_others_and_a_file_elsewhere_sets_only_its_own(params):
    apply_recipe("gpt2-124m", params, RECIPES)
    direct = params.read_bytes()
    apply_recipe("seed-001", params, RECIPES)  # another optimiser, schedule, rule, split
    apply_recipe("gpt2-124m", params, RECIPES)
    assert params.read_bytes() == direct
    apply_recipe("seed-000", params, RECIPES)
    own = own_recipe(params.parent, "optim:\n  lr: 1.0e-4\n")
    assert apply_recipe(own, params, RECIPES) == "optim.lr: 3.0e-4 -> 1.0e-4"


def test_a_value_is_copied_as_text(params):
    own = own_recipe(params.parent, "optim:\n  eps: 1.0e-9 # small\n  max_grad_norm: null\n  betas: [0.9, 0.950]\n")
    assert apply_recipe(own, params) == "optim.eps: 1.0e-8 -> 1.0e-9\noptim.max_grad_norm: 1.0 -> null"
    assert "\n  eps: 1.0e-9 # " in params.read_text()
    assert (
        "\n  betas: [0.9, 0.95] # beta1 and beta2 of AdamW, each 0 to below 1\n" in params.read_text()
    )  # an equal value, so unchanged
    one_step_not_a_share = own_recipe(params.parent, "optim: {initial_lr: 0}")
    assert apply_recipe(one_step_not_a_share, params) == "optim.initial_lr: 0.0 -> 0"


def test_block_lists_and_missing_values_are_replaced(params):
    """`dvc exp run -S` writes lists and null in this form."""
    params.write_text(
        "optim:\n  betas:    # of AdamW\n  - 0.8\n  - 0.99\n  # the next\n  max_grad_norm:     # none\n  one:\n  - 1\n"
    )
    own = own_recipe(params.parent, "optim:\n  betas: [0.9, 0.95]\n  max_grad_norm: 1.0\n  one: [2]\n")
    assert apply_recipe(own, params).splitlines() == [
        "optim.betas: - 0.8 - 0.99 -> [0.9, 0.95]",
        "optim.max_grad_norm: null -> 1.0",
        "optim.one: - 1 -> [2]",
    ]
    assert params.read_text() == (
        "optim:\n  betas:    # of AdamW\n    [0.9, 0.95]\n  # the next\n"
        "  max_grad_norm: 1.0     # none\n  one:\n    [2]\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"own.yaml: optim.lrr: no such key in .*params.yaml \(did you mean optim.lr\?\)"),
        ("optim: 3", "optim: no such key"),
        (
            "optim: {lr: 0.1}\nsweep: {space: {optim: {lrr: {low: 0.1, high: 0.2, log: true}}}}",
            r"sweep.space.optim.lrr.low: no such key in .*params.yaml \(did you mean sweep.space.optim.lr.low\?\)",
        ),
        ("optim: {lr: {peak: 1}}", "optim.lr.peak: no such key"),
        ("optim:\n  betas:\n  - 0.9\n  - 0.99\n", "optim.betas: write the value on one line"),
        ("- optim", "contains no sections"),
        ("optim: {", "is not YAML"),
    ],
)
def test_an_invalid_recipe_changes_nothing(text, message, params):
    before = params.read_bytes()
    with pytest.raises(InputError, match=message):
        apply_recipe(own_recipe(params.parent, text), params)
    assert params.read_bytes() == before


def test_a_range_that_only_an_own_recipe_in_recipes_has_is_no_such_key(params):
    folder = Path(shutil.copytree(RECIPES, params.parent / "recipes"))
    (folder / "own.yaml").write_text("optim: {lr: 0.1}\nsweep: {space: {optim: {eps: [1.0e-8]}}}\n")
    before = params.read_bytes()
    with pytest.raises(InputError, match=r"own.yaml: sweep.space.optim.eps: no such key in "):
        apply_recipe("own", params, folder)
    assert params.read_bytes() == before


def test_recipes_are_listed_with_their_purpose_and_an_unknown_one_gets_a_hint():
    listed = list_recipes(RECIPES)
    assert listed["smoke"].startswith("The whole pipeline in about 20 seconds of work")
    assert all(listed.values())
    with pytest.raises(
        InputError, match=r"no recipe latop \(did you mean laptop\?\): .*recipes contains .*laptop.*smoke"
    ):
        find_recipe("latop", RECIPES)


def parsed(arguments: str) -> dict:
    """The values that `dvc exp run` reads from its arguments."""
    words = shlex.split(arguments)
    assert words[::2] == ["-S"] * (len(words) // 2)
    overrides = OverridesParser.create().parse_overrides(words[1::2])
    return {override.key_or_group: override.value() for override in overrides}


def test_smoke_as_arguments_has_the_values_of_its_file_and_of_laptop():
    laptop, smoke = (flatten(load_params(RECIPES / f"{name}.yaml").values) for name in ("laptop", "smoke"))
    assert parsed(as_set("smoke", RECIPES)) == laptop | smoke


def test_any_value_as_an_argument_is_read_unchanged_by_the_shell_and_dvc(tmp_path):
    texts = ["null", "a: b", "it's", 'say "so"', "back\\", '\\"', "a\nb", "$HOME `x`", "1e-3", "", "naïve"]
    ascii_characters = [chr(code) for code in range(32, 127)]
    for value in [None, True, -3, 10**30, 0.1, -1e-300, *texts, texts[1:6], ascii_characters, []]:
        own = own_recipe(tmp_path, yaml.safe_dump({"a": {"b": value}}, allow_unicode=True))
        assert parsed(as_set(own)) == {"a.b": value}


PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "finetune-gpt2": 124_439_808,
    "seed-003": 124_475_904,  # its vocabulary is padded to 50,304
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, RunConfig]:
    """The run of each published system and of each size of GPT-2."""
    path = Path(shutil.copy(ROOT / "params.yaml", tmp_path_factory.mktemp("configs")))
    found = {}
    for name in PARAMETERS | PUBLISHED:
        apply_recipe(name, path, RECIPES)
        found[name] = RunConfig.of(load_params(path)).sized_for(50257)
        assert load_params(path).section(CorpusConfig).fraction == 1.0
    return found


def test_a_recipe_has_exactly_the_parameters_of_its_gpt2(configs):
    assert {name: configs[name].model.n_params for name in PARAMETERS} == PARAMETERS


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_system_has_the_tokens_and_the_learning_rates_that_it_printed(name, configs):
    """Its step s is our step s + 1. Some schedules count from 0 and others from 1, so each rate may differ by its
    change in one step, and by the rounding of the printed number."""
    config, points = configs[name], PUBLISHED[name]
    assert ((points["step"] + 1) * config.windows.step_tokens == points["tokens"]).all()
    assert not config.model.fold_vocab
    assert config.optim.name == "adamw"
    optim, total = config.optim, config.optim.max_steps(config.windows, STEPS[name][0])
    assert total * config.windows.step_tokens >= points["tokens"].max()
    printed = points.dropna(subset="lr") if name != "seed-000" else points[:0].assign(lr="")  # it printed none
    for step, text in zip(printed["step"], printed["lr"], strict=True):
        steps = [max(1, min(s, total)) for s in (step, step + 1, step + 2)]
        before, ours, after = (optim.lr * lr_factor(s, total, optim) for s in steps)
        one_step = max(abs(ours - before), abs(after - ours))
        digits = len(text.partition(".")[2]) if "e" not in text else 0
        rounded = 10.0 ** -max(6, digits)
        assert abs(ours - float(text)) <= one_step + rounded, f"step {step}: {ours:.4g}, printed {text}"
