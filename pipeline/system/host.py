"""Information about this machine and the commit."""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

ADD_PIP = "`python -m ensurepip` adds it, or `uv pip install pip` in an environment made by uv"
REINSTALL = "`make clean-venv install` makes it again"
SOURCE_ROOT = Path(__file__).parents[2]  # the folder with pipeline/, stages/ and webapp/


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


def uses_gpus() -> bool:
    """Whether the installed torch is a build for CUDA or ROCm. Torch, which takes seconds, is not imported."""
    torch = util.find_spec("torch")
    assert torch is not None, "a requirement"
    assert torch.origin is not None, "a package with an __init__.py"
    build = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    return re.search(r"^(cuda|hip)\b[^=]*= *['\"]", build, re.MULTILINE) is not None  # None in a CPU build


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
