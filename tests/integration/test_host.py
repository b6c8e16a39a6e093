"""The commit that a run records."""

import subprocess

from pipeline.system.host import git_info

UNKNOWN = {"git_commit": "unknown", "tree_clean": "unknown"}


def test_the_commit_is_recorded_and_whether_more_than_dvcs_outputs_differs_from_it(tmp_path, monkeypatch, commit_all):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_info() == UNKNOWN  # no repository
    (tmp_path / "params.yaml").write_text("x: 1\n")
    commit_all(tmp_path)
    assert git_info() == UNKNOWN  # another project's repository, around this one
    (tmp_path / "dvc.yaml").touch()
    commit_all(tmp_path)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, timeout=60).strip()
    assert git_info() == {"git_commit": commit, "tree_clean": "true"}
    (tmp_path / "dvc.lock").write_text("made by dvc repro\n")
    assert git_info()["tree_clean"] == "true"
    (tmp_path / "params.yaml").write_text("x: 2\n")
    assert git_info() == {"git_commit": commit, "tree_clean": "false"}
    monkeypatch.setenv("PATH", "")
    assert git_info() == UNKNOWN  # no git
