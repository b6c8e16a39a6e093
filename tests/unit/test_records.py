"""RECORDS.md against the recipes and the showcase, and both tables of the comparison against RECORDS.md."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from pipeline.config.params import load_params
from pipeline.config.sections import CorpusConfig, WindowsConfig
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[2]


def table(name, below):
    """The rows, as dicts by column, of the table of a page whose first column is `below`."""
    lines = (ROOT / name).read_text().split(f"\n| {below} |", 1)[1].split("\n\n")[0].splitlines()
    columns, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    return [dict(zip([below, *columns], row, strict=True)) for row in rows]


BASE = yaml.safe_load((ROOT / "recipes/laptop.yaml").read_text())  # has the values that a recipe does not name
RECORDS = table("RECORDS.md", "date")
LATEST = {row["recipe"].strip("`"): row for row in RECORDS}  # the last row of each recipe


def number(cell):
    return float(cell.replace(",", ""))


@pytest.mark.parametrize("recipe", LATEST)
def test_a_records_steps_with_its_recipe_give_its_tokens(recipe):
    record, settings = LATEST[recipe], yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text())
    assert record["rule"] == settings.get("target", {}).get("rule", "sliding")
    windows = WindowsConfig(**BASE["windows"] | settings["windows"])
    seen = number(record["steps"]) * windows.step_tokens
    assert 0.99 * seen < number(record["tokens"]) <= seen  # a little less: each epoch ends with a shorter window
    assert number(record["loss"]) < settings["target"]["loss"]
    bytes_per_token = {"whole": 3.30, "first tenth": 3.26, "first nine tenths": 1.0}[record["text"]]  # 1: characters
    assert number(record["bits per byte"]) == pytest.approx(
        number(record["loss"]) / bytes_per_token / math.log(2), rel=0.01
    )
    assert number(record["train s"]) < number(record["wall s"])


@pytest.mark.parametrize("row", RECORDS, ids=lambda row: f"{row['recipe'].strip('`')}-{row['date']}")
def test_a_spread_is_that_of_n_seeds_of_which_the_row_is_one(row):
    n, spread = int(row["n"]), row["tokens of n seeds"]
    if n == 1:
        assert spread == "-"
    else:
        mean, sd = map(number, spread.split(" ± "))
        # No value of a sample is further from its mean (Samuelson 1968); both are rounded to tokens.
        assert abs(number(row["tokens"]) - mean) <= (sd + 0.5) * (n - 1) / math.sqrt(n) + 0.5


COMPARISON = "docs/reference/comparison.md"


@pytest.mark.parametrize("page", [COMPARISON, "README.md"])
@pytest.mark.parametrize("recipe", LATEST)
def test_the_comparison_has_the_latest_record(page, recipe):
    record = LATEST[recipe]
    below = "held-out characters" if record["rule"] == "validation" and page == COMPARISON else "trained by"
    (shown,) = [row for row in table(page, below) if row[below].strip("*") == recipe]
    assert shown.get("steps", record["steps"]) == record["steps"]
    assert shown["tokens"] == f"{number(record['tokens']) / 1e6:.2f}M"
    assert shown["time"].startswith(f"{round(number(record['train s'])):,} s")
    if page == "README.md":  # the long table has a column for each rule
        assert (shown["rule"].strip("`"), shown["loss"]) == (record["rule"], record["loss"])


def test_readme_has_the_recall_of_the_showcase():
    recall = json.loads((ROOT / "docs/showcase/metrics.json").read_text())["verbatim_recall_anywhere"]
    (shown,) = re.findall(r"recites (\d+)% of its passages of 32 tokens", (ROOT / "README.md").read_text())
    assert int(shown) == round(100 * recall)


def test_the_showcase_has_the_parameters_of_params_yaml_and_the_result_of_the_latest_record():
    default, shown = load_params(ROOT / "params.yaml"), load_params(ROOT / "docs/showcase/params.yaml")
    assert RunConfig.of(shown).digest == RunConfig.of(default).digest
    assert shown.section(CorpusConfig) == default.section(CorpusConfig)
    metrics, record = json.loads((ROOT / "docs/showcase/metrics.json").read_text()), LATEST["laptop"]
    reached = metrics["to_target"]["sliding"]
    assert (f"{reached['steps']:,}", f"{reached['tokens']:,}") == (record["steps"], record["tokens"])
    assert f"{metrics['sliding_loss']:.4f}".lstrip("0") == record["loss"]
