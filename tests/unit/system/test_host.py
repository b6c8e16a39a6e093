"""What a run notes of the commit and of the machine that it is made with."""

import subprocess

from pipeline.system.host import git_info, host_info


def test_the_commit_is_told_and_whether_more_than_dvcs_own_outputs_differs_from_it(tmp_path, monkeypatch, commit_all):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("x: 1\n")
    commit_all(tmp_path)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, timeout=60).strip()
    assert git_info() == {"git_commit": commit, "tree_clean": "true"}
    (tmp_path / "dvc.lock").write_text("made by dvc repro\n")
    assert git_info()["tree_clean"] == "true"
    (tmp_path / "params.yaml").write_text("x: 2\n")
    assert git_info() == {"git_commit": commit, "tree_clean": "false"}


def test_what_git_does_not_know_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    unknown = {"git_commit": "unknown", "tree_clean": "unknown"}
    assert git_info() == unknown
    monkeypatch.setenv("PATH", "")  # no git
    assert git_info() == unknown


def test_python_processor_and_packages_are_told():
    facts = host_info()
    assert all(facts[name] for name in ("python", "platform", "cpu"))
    assert any(package.startswith("torch==") for package in facts["packages"])
