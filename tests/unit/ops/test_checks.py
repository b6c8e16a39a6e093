"""What training will meet on a machine: each fault provoked, and named with what to do."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.ops import checks as environment
from pipeline.ops.checks import (
    cpu_quota,
    examine_disk,
    examine_machine,
    examine_packages,
    examine_params,
    examine_tools,
)
from pipeline.system import device as machine

ROOT = Path(__file__).parents[3]


@pytest.fixture
def pyproject(tmp_path):
    """Writes one that asks for these packages."""

    def write(*dependencies, python=">=3.11"):
        path = tmp_path / "pyproject.toml"
        path.write_text(f'[project]\nrequires-python = "{python}"\ndependencies = {list(dependencies)}\n')
        return path

    return write


def marks(findings):
    return [(finding.mark, finding.what) for finding in findings]


def test_what_is_installed_here_fits():
    (finding,) = examine_packages(ROOT / "pyproject.toml")
    assert finding.mark == "ok"
    assert "torch" in finding.what


@pytest.mark.fault
def test_a_package_that_is_too_old_or_absent_is_named_with_what_is_needed(pyproject):
    found = list(examine_packages(pyproject("torch>=99", "no-such-package>=1", "mlflow")))
    assert [finding.mark for finding in found] == ["mend", "mend"]
    assert found[0].what.endswith("is installed, needed is >=99")
    assert found[1].what == "no-such-package is not installed, needed is >=1"
    assert "pip install" in found[0].hint


def test_a_package_that_this_python_does_not_need_is_not_asked_for(pyproject):
    (finding,) = examine_packages(pyproject("no-such-package; python_version < '3'", "torch"))
    assert finding.what.endswith("all 1 packages fit pyproject.toml")


@pytest.mark.fault
def test_a_python_that_is_too_old_is_named(pyproject):
    finding, *_ = examine_packages(pyproject("torch", python=">=4"))
    assert finding.mark == "mend"
    assert finding.what.endswith("needed is >=4")


def test_without_a_pyproject_nothing_is_claimed(tmp_path):
    (finding,) = examine_packages(tmp_path / "pyproject.toml")
    assert finding.mark == "note"


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"a/b/cpu.max": "150000 100000"}, "0::/a/b", 1.5),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 0.5),  # the group above binds too
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "200000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
         "4:memory:/y\n3:cpu,cpuacct:/x", 2.0),  # version 1
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", None),
        ({}, "", None),
    ],
)  # fmt: skip
def test_the_time_that_a_system_grants_is_read_from_its_groups(tmp_path, files, own, quota):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "own") == quota


def test_a_quota_below_the_cores_is_worth_a_line(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 8)
    monkeypatch.setattr(environment, "cpu_quota", lambda _: 2.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads = [finding for finding in examine_machine() if finding.topic == "threads"]
    assert [finding.mark for finding in threads] == ["ok", "note", "note"]
    assert threads[1].hint == "train.threads: 2"
    assert threads[2].what.startswith("OMP_NUM_THREADS=3 ")


@pytest.mark.parametrize(("precision", "words"), [("bf16", "fast here"), ("fp32", "no fast bf16")])
def test_the_precision_comes_with_its_reason(monkeypatch, precision, words):
    device = SimpleNamespace(type="cpu")
    machine = SimpleNamespace(device=device, precision=precision, threads=2, compiled=False)
    monkeypatch.setattr(environment, "prepare_machine", lambda _: print("no C++ compiler here") or machine)
    found = {finding.topic: finding for finding in examine_machine()}
    assert words in found["precision"].what
    assert found["compiler"].what == "no C++ compiler here; nothing else needs one"
    assert found["compiler"].mark == "note"


@pytest.mark.fault
def test_tools_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(f.mark, f.topic) for f in examine_tools(tmp_path)] == [("mend", "git"), ("mend", "dvc")]


@pytest.mark.fault
def test_a_dvc_of_an_environment_that_was_moved_is_named(tmp_path, monkeypatch):
    (script := tmp_path / "dvc").write_text("#!/gone/.venv/bin/python\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = {finding.topic: finding for finding in examine_tools(tmp_path)}
    assert found["dvc"].mark == "mend"
    assert "/gone/.venv/bin/python" in found["dvc"].what


def test_a_folder_without_git_is_worth_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {finding.topic: finding for finding in examine_tools(tmp_path)}
    assert (found["git"].mark, "no repository" in found["git"].what) == ("note", True)


def test_the_committed_params_are_sound():
    (finding,) = examine_params(ROOT)
    assert finding.mark == "ok"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("n_head: 6", "n_head: 7"), "n_head"),
        (("device: auto", "device: cuda"), "this machine has no cuda"),
        (("optim:", "optin:"), "did you mean optim?"),
    ],
)
def test_params_that_are_not_sound_here_are_a_fault(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace(*change, 1))
    (finding,) = examine_params(tmp_path)
    assert finding.mark == "mend"
    assert words in finding.what


@pytest.mark.parametrize(
    ("change", "words", "cure"),
    [
        (("threads: auto", "threads: 3"), "train.threads is 3, and 2 cores may be used", "train.threads: auto"),
        (("precision: auto", "precision: bf16"), "train.precision is bf16, in which", "train.precision: auto"),
    ],
)
def test_a_slow_choice_is_worth_a_line(tmp_path, monkeypatch, change, words, hint):
    monkeypatch.setattr(environment, "cores", lambda: 2)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)  # and yet slower than fp32
    monkeypatch.setattr(machine, "_product_s", lambda dtype: 2.0 if dtype == torch.bfloat16 else 1.0)
    text = (ROOT / "params.yaml").read_text().replace("device: auto", "device: cpu")
    (tmp_path / "params.yaml").write_text(text.replace(*change, 1))
    sound, note = examine_params(tmp_path)
    assert (sound.mark, note.mark, note.hint) == ("ok", "note", hint)
    assert words in note.what


def test_missing_params_are_a_fault_with_its_own_cure(tmp_path):
    (finding,) = examine_params(tmp_path)
    assert (finding.mark, finding.hint) == ("mend", None)
    assert "run from the folder that holds it" in finding.what


@pytest.mark.fault
def test_a_disk_that_lacks_what_the_recipe_takes_is_named_with_both_figures(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    needed = sum(environment._needs(tmp_path).values())
    assert needed > 4 * 3 * 4 * 10_000_000  # four checkpoints of ten million parameters with two moments, in fp32
    for free, mark in ((needed, "ok"), (needed - 1, "mend")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        finding = examine_disk(tmp_path)
        assert finding.mark == mark
        assert f"{free / 1e9:,.1f} GB free for checkpoints, models, .dvc, mlruns" in finding.what


@pytest.mark.fault
def test_without_a_recipe_the_disk_has_a_floor(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=environment.FLOOR_BYTES - 1))
    assert examine_disk(tmp_path).mark == "mend"


def test_the_environment_is_looked_at_without_a_trace(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True, timeout=60)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert {"packages", "threads", "GPU", "disk"} <= {f.topic for f in environment.examine_environment(tmp_path)}
    assert sorted(tmp_path.rglob("*")) == before
