"""The doctor's checks of packages, tools, params.yaml and the disk: each fault is found and has a hint."""

import fcntl
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.data.tokenizer import make_tokenizer
from pipeline.ops import checks
from pipeline.ops.checks import examine_packages, examine_params, examine_tools
from pipeline.system.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _threads_as_before():
    """The checks of params.yaml set PyTorch's threads, as training does."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def project(tmp_path):
    """Makes a folder with a changed copy of params.yaml."""

    def make(old="seed: 1", new="seed: 2"):
        text = (ROOT / "params.yaml").read_text()
        assert old in text
        (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
        return tmp_path

    return make


def test_the_installed_packages_and_the_committed_params_are_valid():
    (packages,) = examine_packages(ROOT)
    assert (packages.mark, "torch" in packages.what) == ("ok", True)
    assert [finding.mark for finding in examine_params(ROOT) if finding.topic == "params"] == ["ok"]


def test_the_disk_that_a_run_needs_depends_on_the_tokenizer(project):
    def needed(folder):
        (found,) = (each for each in examine_params(folder) if each.topic == "disk")
        return float(re.search(r"may need ([\d.,]+) GB", found.what)[1])

    of_gpt2, folder = needed(project("n_embd: 512", "n_embd: 2048")), project("n_embd: 512", "n_embd: 2048")
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("tokenizer: gpt2", "tokenizer: chars"))
    unknown = needed(folder)  # how many characters the text has: 65,536 ids are assumed
    make_tokenizer("chars", folder / "data" / "tokenizer", [b"text"])
    assert unknown > of_gpt2 > needed(folder)


@pytest.mark.parametrize(
    ("python", "dependencies", "expected"),
    [
        (">=3.11", ["no-such-package; python_version < '3'", "torch"], ["all 1 packages fit pyproject.toml"]),
        (">=4", ["torch"], [", but pyproject.toml requires >=4"]),
        (
            ">=3.11",
            ["torch>=99", "no-such-package>=1", "mlflow"],
            [", but pyproject.toml requires >=99", "no-such-package is not installed, but pyproject.toml requires >=1"],
        ),
    ],
)
def test_missing_and_old_packages_are_named_with_the_version_required(tmp_path, python, dependencies, expected):
    text = f'[project]\nrequires-python = "{python}"\ndependencies = {dependencies}\n'
    (tmp_path / "pyproject.toml").write_text(text)
    found = list(examine_packages(tmp_path))
    for finding, end in zip(found, expected, strict=True):
        assert finding.what.endswith(end)
        assert (finding.mark, finding.hint) == (("ok", None) if "fit" in end else ("to fix", checks.INSTALL))


def test_a_missing_pip_is_a_note(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[project]\nrequires-python = '>=4'\ndependencies = []\n")
    monkeypatch.setitem(sys.modules, "pip", None)  # as in an environment made by uv
    note, _ = examine_packages(tmp_path)
    assert (note.mark, f"{sys.executable} has no pip" in note.what) == ("note", True)


def test_missing_and_moved_programs_and_a_missing_repository_are_named(tmp_path, monkeypatch):
    (script := tmp_path / "dvc").write_text("#!/moved/.venv/bin/python\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    git, dvc, repository = examine_tools(tmp_path)
    assert [(finding.mark, finding.topic) for finding in (git, dvc)] == [("to fix", "git"), ("to fix", "dvc")]
    assert "if the folder was moved" in dvc.hint
    assert (repository.mark, "git does not track" in repository.what) == ("note", True)
    assert "dvc config --local core.no_scm true" in repository.hint


@pytest.mark.parametrize(("cores", "hint"), [(2, "train.threads: 2"), (3, None)])
def test_more_threads_than_usable_cores_are_a_note(monkeypatch, project, cores, hint):
    monkeypatch.setattr(checks, "cores", lambda: cores)
    found = examine_params(project("threads: auto", "threads: 3"))
    assert [finding.hint for finding in found if finding.mark == "note"] == ([hint] if hint else [])


def test_a_missing_compiler_is_a_note(monkeypatch, project):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = {finding.topic: finding for finding in examine_params(project("compile: auto", "compile: true"))}
    assert "C++ compiler not found" in found["compile"].what


def without_locks(file, operation):
    raise OSError(37, "No locks available")


def test_a_disk_without_locks_is_named(project, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    folder = project()
    (disk, _) = [finding for finding in examine_params(folder) if finding.topic == "disk"]
    assert (disk.mark, f"disk of {folder} cannot lock files (no locks available)" in disk.what) == ("to fix", True)


def test_invalid_params_are_refused(project):
    with pytest.raises(InputError, match=r"did you mean optim\?"):
        list(examine_params(project("optim:", "optin:")))


def test_a_disk_too_small_for_the_run_is_named_with_both_sizes(project, monkeypatch):
    for free, mark in ((4 * 3 * 4 * 10_000_000, "to fix"), (10**12, "ok")):  # four checkpoints of 10M parameters, fp32
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        (disk,) = [finding for finding in examine_params(project()) if finding.topic == "disk"]
        assert disk.mark == mark
        assert f"{free // 10**8 / 10:,.1f} GB free" in disk.what


def test_a_disk_that_is_too_small_never_has_as_many_bytes_free_as_needed(project, monkeypatch):
    monkeypatch.setattr(checks, "saved_bytes", lambda *_: (101_000_000, 100_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=703_000_000))
    (disk,) = [finding for finding in examine_params(project()) if finding.topic == "disk"]
    assert disk.mark == "to fix"
    assert re.search(r"^0\.7 GB free in .*, a run may need 0\.8 GB$", disk.what)
