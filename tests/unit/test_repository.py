"""The repository: no call that runs what a file holds, no dependency with a known hole, no weights, no secrets."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
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

UNSAFE = {
    "S301": "import pandas\npandas.read_pickle(f)",
    "S506": "import yaml\nyaml.load(f, Loader=yaml.UnsafeLoader)",
    "S307": "eval(f)",
    "S102": "exec(f)",
    "S602": "import subprocess\nsubprocess.run(f, shell=True)",
    "S605": "import os\nos.system(f)",
    "S306": "import tempfile\ntempfile.mktemp()",
    "S202": "import tarfile\ntarfile.open(f).extractall()",
    "S501": "import requests\nrequests.get(f, timeout=1, verify=False)",
    "TID251": "from mlflow.pyfunc import load_model\nload_model(f)",
}


def test_lint_fails_at_an_unsafe_call_in_every_place_but_the_tests(tmp_path):  # F1
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    expected = set()
    for place in (*PLACES, "."):
        (tmp_path / place).mkdir(exist_ok=True)
        for rule, program in UNSAFE.items():
            (tmp_path / place / f"{rule}.py").write_text(program)
            expected.add((f"{place}/{rule}.py".removeprefix("./"), rule))
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    found = {
        (Path(fault["filename"]).relative_to(tmp_path).as_posix(), fault["code"]) for fault in json.loads(done.stdout)
    }
    assert expected <= found


def test_nothing_trusts_the_code_in_a_file():  # F1: keyword arguments, which ruff does not see
    for path in PROGRAMS:
        assert not re.search(r"allow_pickle=(?!False)|trust_remote_code=(?!False)", path.read_text()), path


UNEXPLAINED = re.compile(
    r"#\s*(ruff:|noqa(?!: )|noqa: (?=[A-Z\d, ]*\bS\d)[A-Z]+\d++(, [A-Z]+\d++)*+(?! \(\w))", re.IGNORECASE
)


def test_an_exception_from_lint_has_its_reason_beside_it():  # F1
    assert all(map(UNEXPLAINED.search, ("x()  # noqa: E501, S301", "x()  # noqa", "# ruff: noqa: S301")))
    assert not UNEXPLAINED.search("x()  # noqa: S301 (our own file)")
    for path in PROGRAMS:
        assert not [line for line in path.read_text().splitlines() if UNEXPLAINED.search(line)], path


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
