"""What training will meet on a machine: each fault provoked, and named with what to do."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.ops import checks
from pipeline.ops.checks import cpu_quota, examine_packages, examine_params, examine_tools
from pipeline.system.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def pyproject(tmp_path):
    """Writes one that asks for these packages; returns its folder."""

    def write(*dependencies, python=">=3.11"):
        text = f'[project]\nrequires-python = "{python}"\ndependencies = {list(dependencies)}\n'
        (tmp_path / "pyproject.toml").write_text(text)
        return tmp_path

    return write


@pytest.fixture
def project(tmp_path):
    """A folder with a copy of params.yaml; returns a function that changes it."""
    shutil.copy(ROOT / "params.yaml", tmp_path)

    def change(old, new):
        text = (tmp_path / "params.yaml").read_text()
        assert old in text
        (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
        return tmp_path

    return change


def test_what_is_installed_here_fits():
    (finding,) = examine_packages(ROOT)
    assert finding.mark == "ok"
    assert "torch" in finding.what


@pytest.mark.fault
def test_a_package_that_is_too_old_or_absent_is_named_with_what_is_needed(pyproject):
    found = list(examine_packages(pyproject("torch>=99", "no-such-package>=1", "mlflow")))
    assert [finding.mark for finding in found] == ["to fix", "to fix"]
    assert found[0].what.endswith(", needed is >=99")
    assert found[1].what == "no-such-package is not installed, needed is >=1"
    assert "pip install" in found[0].hint


def test_a_package_that_this_python_does_not_need_is_not_asked_for(pyproject):
    (finding,) = examine_packages(pyproject("no-such-package; python_version < '3'", "torch"))
    assert finding.what.endswith("all 1 packages fit pyproject.toml")


@pytest.mark.fault
def test_a_python_that_is_too_old_is_named(pyproject):
    (finding,) = examine_packages(pyproject("torch", python=">=4"))
    assert finding.mark == "to fix"
    assert finding.what.endswith("needed is >=4")


@pytest.mark.parametrize(("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), (None, None)])
def test_the_quota_of_a_container_is_read(tmp_path, text, quota):
    if text:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert cpu_quota(tmp_path / "cpu.max") == quota


@pytest.mark.parametrize(("cores", "quota", "hint"), [(2, None, "2"), (8, 2.5, "2"), (3, 8.0, None)])
def test_more_threads_than_may_be_used_are_worth_a_line(monkeypatch, project, cores, quota, hint):
    monkeypatch.setattr(checks, "cores", lambda: cores)
    monkeypatch.setattr(checks, "cpu_quota", lambda: quota)
    found = examine_params(project("threads: auto", "threads: 3"))
    assert [finding.hint for finding in found if finding.mark == "note"] == ([f"train.threads: {hint}"] if hint else [])


def test_what_training_says_of_the_compiler_is_a_line(monkeypatch, project):
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = {finding.topic: finding for finding in examine_params(project("compile: auto", "compile: true"))}
    assert "no C++ compiler here" in found["compiler"].what


@pytest.mark.fault
def test_tools_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [(finding.mark, finding.topic) for finding in examine_tools(tmp_path)]
    assert found[:2] == [("to fix", "git"), ("to fix", "dvc")]


@pytest.mark.fault
def test_a_dvc_of_an_environment_that_was_moved_is_named(tmp_path, monkeypatch):
    (script := tmp_path / "dvc").write_text("#!/gone/.venv/bin/python\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (dvc,) = [finding for finding in examine_tools(tmp_path) if finding.topic == "dvc"]
    assert dvc.mark == "to fix"
    assert "where the folder was moved" in dvc.hint


def test_a_folder_without_git_is_worth_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(finding.mark == "note" and "no repository" in finding.what for finding in examine_tools(tmp_path))


def test_the_committed_params_are_sound():
    assert [finding.mark for finding in examine_params(ROOT) if finding.topic == "params"] == ["ok"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("n_head: 6", "n_head: 7", "n_head"),
        ("device: auto", "device: cuda", "this machine has no cuda"),
        ("precision: auto", "precision: fp16", "fp16 is for GPUs"),
        ("optim:", "optin:", "did you mean optim?"),
    ],
)
def test_params_that_are_not_sound_here_are_a_fault(project, monkeypatch, old, new, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=words):
        list(examine_params(project(old, new)))


@pytest.mark.fault
def test_a_disk_that_lacks_what_the_run_takes_is_named_with_both_figures(project, monkeypatch):
    root = project("seed: 1", "seed: 2")
    for free, mark in ((4 * 3 * 4 * 10_000_000, "to fix"), (10**12, "ok")):  # four checkpoints of 10M parameters, fp32
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        (disk,) = [finding for finding in examine_params(root) if finding.topic == "disk"]
        assert disk.mark == mark
        assert f"{free / 1e9:,.1f} GB free" in disk.what
