"""Child processes: where they find programs and code."""

import subprocess

import pytest

from pipeline.system.host import SOURCE_ROOT
from pipeline.system.processes import spawn_module


@pytest.mark.parametrize(("present", "path"), [(None, ""), ("", ""), ("/a:/b", ":/a:/b")])
def test_a_child_finds_this_code_first_and_the_working_directory_is_not_added(present, path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: started.append(env["PYTHONPATH"]))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if present is not None:
        monkeypatch.setenv("PYTHONPATH", present)
    spawn_module("a.module")
    assert started == [f"{SOURCE_ROOT}{path}"]
