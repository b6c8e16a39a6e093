"""The doctor's check of .venv: one that was moved or copied with its project is found."""

import json

import pytest

from pipeline.ops import installation
from pipeline.ops.installation import examine_installation

HINT = "`make clean-venv install` makes it again"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Makes a project with a .venv, whose programs start `python` and whose editable installation is of `code`."""

    def make(python=None, code=None, begin="#!{}\n", in_use=True):
        root, python = tmp_path / "own place", python or tmp_path / "own place" / ".venv" / "bin" / "python3.14"
        record = root / ".venv/lib/python3.14/site-packages/gpt2_to_target-1.0.0.dist-info/direct_url.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"dir_info": {"editable": True}, "url": (code or root).as_uri()}))
        (root / ".venv" / "bin").mkdir()
        (root / ".venv" / "bin" / "python3.14").symlink_to(tmp_path / "usr" / "python3.14")  # as venv makes it
        (root / ".venv" / "pyvenv.cfg").touch()
        for name in ("totarget", "dvc"):
            (root / ".venv" / "bin" / name).write_text(begin.format(python) + "import sys\n")
        if in_use:
            monkeypatch.setattr("sys.prefix", str(root / ".venv"))
        return root

    return make


LONG = '#!/bin/sh\n\'\'\'exec\' "{}" "$0" "$@"\n'  # of pip, if the path is long or has a space
RELOCATABLE = '#!/bin/sh\n\'\'\'exec\' "$(dirname -- "$(realpath -- "$0")")"/\'python\' "$0" "$@"\n'  # of uv


@pytest.mark.parametrize("begin", ["#!{}\n", LONG, RELOCATABLE, "#!/bin/sh", ""])
def test_an_environment_of_this_folder_is_ok(project, begin):
    root = project(begin=begin)
    assert [(found.mark, found.what) for found in examine_installation(root)] == [
        ("ok", f"{root}/.venv runs the code of {root}")
    ]


@pytest.mark.parametrize("begin", ["#!{}\n", LONG])
def test_programs_that_start_the_python_of_another_folder_are_found(project, tmp_path, begin):
    other = tmp_path / "old" / ".venv" / "bin" / "python"
    root = project(python=other, begin=begin)
    (found,) = examine_installation(root)
    assert (found.mark, found.hint) == ("to fix", HINT)
    assert found.what.startswith(f"totarget, dvc in {root}/.venv/bin start {other}, not its own Python")


@pytest.mark.parametrize("exists", [True, False])  # the project was copied, or moved
def test_an_installation_that_runs_the_code_of_another_folder_is_found(project, tmp_path, exists):
    root = project(code=tmp_path / "old")
    if exists:
        (tmp_path / "old").mkdir()
    (found,) = examine_installation(root)
    assert (found.mark, found.hint) == ("to fix", HINT)
    assert found.what.startswith(f"the programs in {root}/.venv/bin run the code of {tmp_path}/old, not that of {root}")


def test_an_environment_of_another_folder_that_is_not_in_use_is_a_note(project, tmp_path):
    """As in a container that mounts a project with its .venv, but has an environment of its own."""
    root = project(python=tmp_path / "old" / "bin" / "python", in_use=False)
    assert [found.mark for found in examine_installation(root)] == ["note", "ok"]


def test_a_link_to_an_environment_of_this_folder_is_ok_and_another_python_is_noted(project, tmp_path):
    root = project(in_use=False)
    (tmp_path / "link").symlink_to(root)
    marks = [(found.mark, found.what) for found in examine_installation(tmp_path / "link")]
    assert marks[0][1].startswith("this is the Python of ")
    assert [mark for mark, _ in marks] == ["note", "ok"]


def test_without_a_venv_the_code_of_this_process_is_checked(tmp_path, monkeypatch):
    assert [found.mark for found in examine_installation(tmp_path)] == ["ok"]
    monkeypatch.setattr(installation, "is_other_code", lambda root: True)
    (found,) = examine_installation(tmp_path)
    assert (found.mark, found.hint) == ("to fix", f"`make install` makes {tmp_path}/.venv")
    assert found.what.startswith(f"this is the code of {installation.SOURCE_ROOT}, not that of {tmp_path}")
