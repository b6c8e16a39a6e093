"""The repository: no call that runs what a file holds, no dependency with a known hole, no weights, no secrets."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.security
ROOT = Path(__file__).parents[2]
PLACES = ("pipeline", "stages", "webapp", "benchmarks", "examples")
PROGRAMS = [ROOT / "app.py", *(path for place in PLACES for path in sorted((ROOT / place).rglob("*.py")))]


# F1: what ruff finds


def found_by_ruff(program: str, place: str = "pipeline/x.py") -> set[str]:
    """The rules that a program of the project would break; lint fails if there is one."""
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename", place, "-"]
    done = subprocess.run(command, cwd=ROOT, input=program, capture_output=True, text=True, timeout=60)
    codes = {fault["code"] for fault in json.loads(done.stdout)}
    assert done.returncode == (1 if codes else 0), done.stderr
    return codes


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        ("import pickle\npickle.load(f)", "S301"),
        ("import pickle\npickle.loads(f)", "S301"),
        ("from pickle import Unpickler as U\nU(f).load()", "S301"),
        ("import dill\ndill.load(f)", "S301"),
        ("import shelve\nshelve.open(f)", "S301"),
        ("import pandas as pd\npd.read_pickle(f)", "S301"),
        ("import marshal\nmarshal.loads(f)", "S302"),
        ("import yaml\nyaml.load(f)", "S506"),
        ("import yaml\nyaml.load(f, Loader=yaml.UnsafeLoader)", "S506"),
        ("eval(f)", "S307"),
        ("exec(f)", "S102"),
        ("import subprocess\nsubprocess.run(f, shell=True)", "S602"),
        ("import os\nos.system(f)", "S605"),
        ("import os\nos.popen(f)", "S605"),
        ("import tempfile\ntempfile.mktemp()", "S306"),
        ("import tarfile\ntarfile.open(f).extractall()", "S202"),
        ("import requests\nrequests.get(f, timeout=1, verify=False)", "S501"),
    ],
)
def test_lint_fails_at_an_unsafe_call(program, rule):  # F1
    assert rule in found_by_ruff(program)


@pytest.mark.parametrize("place", ["app.py", *(f"{place}/x.py" for place in PLACES)])
def test_lint_fails_so_everywhere_but_in_the_tests(place):  # F1
    assert "S307" in found_by_ruff("eval(f)", place)


UNEXPLAINED = re.compile(
    r"#\s*(ruff:|noqa(?!: )|noqa: (?=[A-Z\d, ]*\bS\d)[A-Z]+\d++(, [A-Z]+\d++)*+(?! \(\w))", re.IGNORECASE
)


@pytest.mark.parametrize(
    ("line", "is_explained"),
    [
        ("x()  # noqa: S301", False), ("x()  # noqa: E501, S301", False), ("x()  # noqa: S301, E501", False),
        ("x()  # noqa", False), ("x()  # NOQA:S301", False), ("x()  #noqa: S301 trust me", False),
        ("# ruff: noqa: S301", False), ("# ruff: noqa", False), ("# ruff: disable[S301]", False),
        ("x()  # noqa: S301 (our own file)", True), ("x()  # noqa: E501, S301 (ours)", True),
        ("x()  # noqa: N818", True),
    ],
)  # fmt: skip
def test_an_exception_without_its_reason_is_found(line, is_explained):
    assert (UNEXPLAINED.search(line) is None) == is_explained


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_exception_from_lint_has_its_reason_beside_it(path):  # F1
    assert not [line for line in path.read_text().splitlines() if UNEXPLAINED.search(line)]


# F1: what ruff does not find

THAT_RUN_CODE = {"pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}  # as they are read
NEVER = {
    *(f"yaml.{kind}_load{which}" for kind in ("unsafe", "full") for which in ("", "_all")),
    *("asyncio.create_subprocess_shell", "torch.hub.load", "torch.jit.load", "runpy.run_path", "__import__"),
}
LOADERS_OF_MODELS = re.compile(r"mlflow(\.\w+)*\.load_model")  # they run what a model's MLmodel file names


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that a program imports, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, whole
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`torch.load` for load, after `from torch import load`; nothing for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def unsafe(program: str) -> list[str]:
    """What a program loads with that would run the code in a file, or may."""
    tree = ast.parse(program)
    names = dict(imported(tree))
    found = [name for name in names.values() if name.partition(".")[0] in THAT_RUN_CODE]
    for node in ast.walk(tree):
        name = full_name(node, names)
        if name in NEVER or LOADERS_OF_MODELS.fullmatch(name):
            found.append(name)
        if isinstance(node, ast.Call):
            name = full_name(node.func, names)
            said = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
            if name == "torch.load" and said.get("weights_only") is not True:
                found.append(name)
            if name == "numpy.load" and len(node.args) > 2:  # the third is allow_pickle
                found.append(name)
            found += [word for word in ("allow_pickle", "trust_remote_code") if said.get(word, False) is not False]
    return found


@pytest.mark.parametrize(
    "program",
    [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=trusted)",
        "from torch import load as read\nread(f)",
        "import torch as t\nt.jit.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, None, True)",
        "from numpy import load\nload(f, allow_pickle=trusted)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(f, trust_remote_code=True)",
        "import mlflow\nmlflow.pyfunc.load_model(f)",
        "import mlflow.pytorch\nmlflow.pytorch.load_model(f)",
        "from mlflow.pyfunc import load_model\nload_model(f)",
        "from mlflow import pyfunc as p\nread = p.load_model",
        "import joblib\njoblib.load(f)",
        "from cloudpickle import loads\nloads(f)",
        "import dill",
        "import pickle as p",
        "import marshal",
        "import yaml\nyaml.unsafe_load(f)",
        "from yaml import full_load\nfull_load(f)",
        "import asyncio\nasyncio.create_subprocess_shell(f)",
        "__import__('pickle').load(f)",
        "def g():\n    if x:\n        import torch\n        return [torch.load(f) for f in fs]",
    ],
)
def test_what_ruff_does_not_find_is_found_here(program):  # F1
    assert unsafe(program)


@pytest.mark.parametrize(
    "program",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)\nnp.load(f, 'r')",
        "from pipeline.training.checkpoint import load_model\nload_model(f)",
        "import yaml\nyaml.safe_load(f)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(f, trust_remote_code=False)",
        "import mlflow.pyfunc\nmlflow.pyfunc.save_model(f)",
    ],
)
def test_what_is_safe_is_not(program):
    assert not unsafe(program)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_a_file_holds_is_run(path):  # F1
    assert not unsafe(path.read_text())


# F2: dependencies with a known hole

FIXED = {"torch": "2.10", "mlflow": "3.11", "gradio": "6.7"}  # the first version without it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def lowest(requirement: str) -> Version:
    """The lower bound of a range; 0 where it has none."""
    bounds = [each for each in Requirement(requirement).specifier if each.operator in (">=", ">", "==", "~=")]
    return max((Version(each.version.removesuffix(".*")) for each in bounds), default=Version("0"))


def of(name: str, requirements: list[str]) -> list[str]:
    return [requirement for requirement in requirements if Requirement(requirement).name == name]


@pytest.mark.parametrize(
    "requirement", ["torch", "torch<3", "torch!=2.9", "torch>=2.9,<3", "torch>=2.10rc1", "torch~=2.9"]
)
def test_a_range_that_lets_a_hole_in_is_found(requirement):
    assert lowest(requirement) < Version(FIXED["torch"])


@pytest.mark.parametrize("name", FIXED)
def test_no_version_with_a_known_hole_is_allowed_pinned_or_installed(name):  # F2
    allowed, pinned = of(name, RANGES), of(name, PINS)
    assert allowed
    assert len(pinned) == 1
    for requirement in (*allowed, *pinned, f"{name}=={metadata.version(name)}"):
        assert lowest(requirement) >= Version(FIXED[name]), requirement


# What is committed

LARGEST_BYTES, LARGEST_PICTURE_BYTES = 1_000_000, 250_000  # a picture of the page has 190,000
MADE = re.compile(
    r"\.(safetensors|pth?|bin|ckpt|onnx|gguf|h5|pkl|pickle|npy|npz|db|sqlite3?|whl|zip|zst|gz|tar)(-\w+)?$"
)
SECRET = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\b(gh[a-z]|hf|sk|github_pat|xox[a-z])[-_][A-Za-z0-9_-]{20,}"
)


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """The files of the repository, and those that would be added to it."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_weights_stores_or_large_files_are_committed(committed):
    assert len(committed) > 100  # that there is something to look at
    assert not [path for path in committed if MADE.search(path.name)]
    for path in committed:
        is_picture = path.suffix in (".png", ".jpg", ".jpeg", ".gif", ".webp")
        assert path.stat().st_size <= (LARGEST_PICTURE_BYTES if is_picture else LARGEST_BYTES), path


def test_no_secrets_are_committed(committed):
    assert not [path for path in committed if SECRET.search(path.read_bytes())]


@pytest.mark.parametrize(
    ("text", "is_secret"),
    [
        ("-----BEGIN OPENSSH " + "PRIVATE KEY-----", True),
        ("token = 'ghp_" + "a1B2" * 9 + "'", True),
        ("hf_" + "a1B2" * 8, True),
        ("AKIA" + "A1B2" * 4, True),
        ("hf_" + "short", False),
    ],
)
def test_a_secret_is_known_as_one(text, is_secret):
    assert bool(SECRET.search(text.encode())) == is_secret
