"""What a run records about its machine: the git commit, the packages and the processor."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCE_ROOT = Path(__file__).parents[2]  # the folder that holds pipeline/, stages/ and webapp/


def git_info() -> dict[str, str]:
    """Commit of the working directory, and whether anything but DVC's own outputs differs from it."""
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!reports")
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
    """What git prints in `folder`, without running the repository's hooks; None where it fails or is missing."""
    command = ["git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
