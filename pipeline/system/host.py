"""Information about this machine and the commit, and child processes that run this code."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from pipeline.system.errors import InputError

ADD_PIP = "`python -m ensurepip` adds it, or `uv pip install pip` in an environment made by uv"
REINSTALL = "`make clean-venv install` makes it again"
SOURCE_ROOT = Path(__file__).parents[2]  # the folder with pipeline/, stages/ and webapp/


def start_module(module: str, *arguments: str, line: Any, **options: Any) -> "subprocess.Popen[str]":
    """Start `python -m module` of this code, and write `line` to its standard input as JSON."""
    process = spawn_module(module, *arguments, **options)
    send_line(process, line)
    return process


def spawn_module(module: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """As `start_module`; the child waits for its line until `send_line` writes it.

    The child has its own process group: Ctrl-C reaches only this process, which then stops the child.
    """
    path = os.pathsep.join([str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, process_group=0, text=True, **options)


def send_line(process: "subprocess.Popen[str]", line: Any) -> None:
    """Write `line` as JSON to the standard input of a process that `spawn_module` has started."""
    assert process.stdin is not None, "stdin=PIPE"
    process.stdin.write(json.dumps(line) + "\n")
    process.stdin.flush()


def dvc_command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of DVC, with this Python's programs first on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return [sys.executable, "-m", "dvc", *arguments], {**os.environ, "PATH": path}


def run_dvc(*arguments: str, capture_output: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run DVC in the working directory; it prints its own errors."""
    command, environment = dvc_command(*arguments)
    return subprocess.run(command, env=environment, capture_output=capture_output, text=True, check=False)


def repro_stage(name: str) -> None:
    """Run `dvc repro` up to a stage before `train`. Raises InputError if it fails.

    These stages take seconds, and so does the wait for the lock of another DVC command.
    """
    if run_dvc("--wait-for-lock", "repro", name).returncode:
        raise InputError(f"`dvc repro {name}` failed, see the error above: fix it first")


def project_root() -> Path:
    """The repository with the checkpoints and the store, also within a copy made by `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT", "")).absolute()


def is_other_code(folder: Path) -> bool:
    """Whether `folder` is a checkout of this project, and this code is of another one."""
    own, this = (root / "pipeline" / "__main__.py" for root in (folder, SOURCE_ROOT))
    return own.is_file() and (SOURCE_ROOT / "pyproject.toml").is_file() and not own.samefile(this)


def has_pip() -> bool:
    """Whether `python -m pip` works; an environment made by uv has no pip."""
    return util.find_spec("pip") is not None


def git_info() -> dict[str, str]:
    """Commit that has the working directory's dvc.yaml, and whether a file but DVC's outputs differs from it."""
    commit = git("rev-parse", "HEAD") if git("ls-tree", "HEAD", "dvc.yaml") else None  # else of a repository around it
    changes = git("status", "--porcelain", "--", ".", ":!dvc.lock")
    clean = "unknown" if commit is None or changes is None else str(not changes).lower()
    return {"git_commit": commit or "unknown", "tree_clean": clean}


def host_info() -> dict[str, Any]:
    packages = sorted(f"{package.name}=={package.version}" for package in metadata.distributions())
    return {"python": sys.version, "platform": platform.platform(), "cpu": cpu_name(), "packages": packages}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git(*arguments: str, folder: Path = Path()) -> str | None:
    """The output of git in `folder`, without the repository's hooks; None if git fails or is missing."""
    command = ["git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
