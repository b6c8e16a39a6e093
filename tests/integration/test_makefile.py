"""Folders that git does not track: make configures DVC to work without git, and says so before it installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ECHO = "#!/bin/sh\necho dvc $@\n"
GIT_FAILS = "mkdir ../bin && printf '#!/bin/sh\nexit 127' >../bin/git && chmod +x ../bin/git"


@pytest.mark.parametrize(
    ("command", "tracked"),
    [
        (":", False),  # a ZIP download
        ("rm -r .dvc", False),  # an upload without hidden folders
        ("mkdir .git", False),
        ("echo gitdir: /nowhere/.git/worktrees/x >.git", False),  # a worktree, or a submodule, that was copied
        ("git -C .. init -q", False),  # within another repository
        (f"git init -q && git add . && {GIT_FAILS}", False),
        ("git init -q && git add .", True),
    ],
)
def test_make_configures_dvc_where_git_does_not_track_the_folder(tmp_path, monkeypatch, command, tracked):
    (folder := tmp_path / "project").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "dvc.yaml", ".dvc/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("python", "dvc"):
        (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (folder / ".venv/bin" / name).write_text(ECHO)
        (folder / ".venv/bin" / name).chmod(0o755)
    subprocess.run(command, shell=True, cwd=folder, check=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    command = ["make", "--silent", ".venv/installed", "PYTHON=true"]
    said, _, later = subprocess.check_output(command, cwd=folder, text=True).partition("pip install")
    assert ("git does not track this folder" in said) is not tracked
    assert ("dvc config --local core.no_scm true" in later) is not tracked
    assert (folder / ".dvc").is_dir()
    # .git may be removed later
    for target, last in (("install", []), ("repro", ["dvc -m pipeline repro"]), ("sweep", ["dvc -m pipeline sweep"])):
        lines = subprocess.check_output(["make", "--silent", target], cwd=folder, text=True).splitlines()
        assert lines == ["dvc config --local core.no_scm true"] * (not tracked) + last
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    assert subprocess.check_output(["make", "--silent", "repro"], cwd=folder, text=True) == "dvc -m pipeline repro\n"
