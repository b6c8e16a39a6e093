"""The repository: lint forbids unsafe calls, and no dependency has a known vulnerability."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLACES = ("pipeline", "stages", "webapp", "benchmarks", "examples")
PROGRAMS = [ROOT / "app.py", *(path for place in PLACES for path in sorted((ROOT / place).rglob("*.py")))]

# F1: unsafe calls

ALLOWED = {"S101", "S603", "S607"}  # assert, and starting a program without a shell
RUN_CODE = """asyncio.create_subprocess_shell cloudpickle dill joblib marshal mlflow.pyfunc.load_model
    mlflow.pytorch.load_model pickle runpy shelve torch.hub.load torch.jit.load torch.load yaml.full_load
    yaml.unsafe_load""".split()  # modules and functions that run the code in a file


def test_lint_forbids_unsafe_calls_everywhere_but_in_the_tests():  # F1
    ruff = PYPROJECT["tool"]["ruff"]
    assert ruff.keys() == {"line-length", "target-version", "lint"}  # nothing is excluded
    assert {"S", "TID251"} <= set(ruff["lint"]["select"])
    assert {rule for rule in ruff["lint"]["ignore"] if re.match(r"S\d*$|TID", rule)} == ALLOWED
    assert ruff["lint"]["per-file-ignores"].keys() == {"tests/*"}
    assert ruff["lint"]["flake8-tidy-imports"]["banned-api"].keys() >= {*RUN_CODE}


def test_no_call_trusts_the_code_in_a_file():  # F1: keyword arguments, which ruff does not check
    for path in PROGRAMS:
        assert not re.search(r"allow_pickle=(?!False)|trust_remote_code=(?!False)", path.read_text()), path


UNEXPLAINED = re.compile(
    r"#\s*(ruff:|noqa(?!: )|noqa: (?=[A-Z\d, ]*\bS\d)[A-Z]+\d++(, [A-Z]+\d++)*+(?! \(\w))", re.IGNORECASE
)


def test_an_exception_from_a_security_rule_has_its_reason_beside_it():  # F1
    assert all(map(UNEXPLAINED.search, ("x()  # noqa: E501, S301", "x()  # noqa", "# ruff: noqa: S301")))
    assert not UNEXPLAINED.search("x()  # noqa: S301 (our own file)")
    for path in PROGRAMS:
        assert not [line for line in path.read_text().splitlines() if UNEXPLAINED.search(line)], path


# F2: dependencies with a known vulnerability

FIXED = {"torch": "2.10", "mlflow": "3.11", "gradio": "6.7"}  # the first version without it
PROJECT = PYPROJECT["project"]
RANGES = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PINS = [line.rstrip(" \\") for lock in LOCKS for line in lock.read_text().splitlines() if re.match(r"\w", line)]


def lowest(requirement):
    """The lower bound of a range; 0 when it has none."""
    bounds = [each for each in Requirement(requirement).specifier if each.operator in (">=", ">", "==", "~=")]
    return max((Version(each.version.removesuffix(".*")) for each in bounds), default=Version("0"))


def requirements_of(name, requirements):
    return [requirement for requirement in requirements if Requirement(requirement).name == name]


@pytest.mark.parametrize("name", FIXED)
def test_no_vulnerable_version_is_allowed_pinned_or_installed(name):  # F2
    for vulnerable in ("torch", "torch<3", "torch!=2.9", "torch>=2.9,<3", "torch>=2.10rc1", "torch~=2.9"):
        assert lowest(vulnerable) < Version(FIXED["torch"])
    allowed, pinned = requirements_of(name, RANGES), requirements_of(name, PINS)
    assert allowed
    assert len(pinned) == 1
    for requirement in (*allowed, *pinned, f"{name}=={metadata.version(name)}"):
        assert lowest(requirement) >= Version(FIXED[name]), requirement


def test_the_lock_has_one_version_of_each_package_that_is_needed_and_its_hashes():
    """Only torch has no hashes: requirements/install.py chooses its build, which names the packages of CUDA itself."""
    versions = [Requirement(pin) for pin in PINS]
    pinned = {each.name.replace("_", "-").lower(): str(each.specifier) for each in versions}
    assert all(pinned[each.name] == str(each.specifier) and str(each.specifier).startswith("==") for each in versions)
    assert not [name for name in pinned if re.match("triton|cuda-|nvidia-(?!ml-py)", name)]
    for needed in map(Requirement, RANGES):
        if needed.name != PROJECT["name"]:
            assert needed.specifier.contains(
                pinned[re.sub("[._]", "-", needed.name)].removeprefix("=="), prereleases=True
            ), needed
    for lock in LOCKS:
        packages = re.split(r"\n(?=\w)", lock.read_text())
        assert lock.name == "torch.txt" or all("--hash=sha256:" in package for package in packages[1:]), lock
