"""The examples for clouds: they are valid YAML, and the commands in them exist."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config.recipes import list_recipes
from tests.commands import check

ROOT = Path(__file__).parents[2]
FILES = ["kubernetes.yaml", "skypilot.yaml"]


def texts_in(value):
    """All strings in a YAML document."""
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in texts_in(child)]


@pytest.mark.parametrize("name", FILES)
def test_the_commands_of_an_example_for_a_cloud_exist(name):
    source = (ROOT / "examples" / name).read_text()
    found = [line.strip() for document in yaml.safe_load_all(source) for text in texts_in(document)
             for line in text.splitlines()]  # fmt: skip
    assert sum(map(check, found)) == 6  # make install, the recipe, tokenize, train, commit, and the other stages
    assert set(re.findall(r"gpt2-[\w]*m\b", source)) <= list_recipes(ROOT / "recipes").keys()
    assert re.search("checked against the schema of .* only", " ".join(source.replace("#", "").split()))


def test_the_job_ends_only_for_errors_that_would_repeat_themselves():
    job = list(yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text()))[1]
    (ignored, ending) = job["spec"]["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget"}]
    containers = {container["name"] for container in job["spec"]["template"]["spec"]["containers"]}
    assert ending["onExitCodes"]["containerName"] in containers
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy needs it
    # invalid parameters, altered files, a loss that diverges, a missing model; no signal, full disk or lock
    assert ending["onExitCodes"]["values"] == [2, 3, 4, 7]
