"""Compare installations in fresh environments: seconds, processor time and bytes on the disk.

    python -m benchmarks.install [--only NAME ...] [--before COMMIT]

Each contestant installs a copy of what git has, in turn, and downloads all packages again:

- `before`: `make` of the commit before there was a lock: pip resolves the ranges of pyproject.toml and of the extra for
  tests within fixed versions, and compiles all packages;
- `pip`, `uv`: `make install` of HEAD with the tool; uv must be installed for the second;
- `pip, dev`: the first one and what `make test` adds.

`first_start_s` is the first start of a program that imports the largest packages, which Python compiles then, where the
installation has not done it.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.system.files import write_json
from pipeline.system.host import host_info

RESULTS = Path("benchmarks/results/install.json")
START = "import dvc.repo, gradio, matplotlib.pyplot, mlflow, optuna, pandas, tokenizers, torch"
COMMANDS = {  # name -> arguments of make
    "before": [".venv/installed"],
    "pip": ["install"],
    "uv": ["install"],
    "pip, dev": ["install", "EXTRAS=dev"],
}
FRESH = {"PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}


def timed(command: list[str], folder: Path, variables: dict[str, str]) -> tuple[float, float]:
    """Run a command; return its wall-clock seconds and the processor seconds of its processes."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start, before = time.perf_counter(), spent()
    subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, spent() - before


def measure(name: str, commit: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="install-") as temporary:
        folder, programs = Path(temporary) / "project", Path(temporary) / "bin"
        folder.mkdir()
        programs.mkdir()
        archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        # uv is on the PATH of its contestant only.
        paths = [path for path in os.environ["PATH"].split(os.pathsep) if not (Path(path) / "uv").exists()]
        if name == "uv":
            (programs / "uv").symlink_to(shutil.which("uv") or sys.exit("error: uv is not installed"))
        variables = {**os.environ, **FRESH, "PATH": os.pathsep.join([str(programs), *paths])}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        seconds, cpu = timed(["make", *COMMANDS[name]], folder, variables)
        environment = folder / ".venv"
        size = sum(path.lstat().st_size for path in environment.rglob("*") if not path.is_dir())
        first, first_cpu = timed([".venv/bin/python", "-c", START], folder, variables)
        return {
            "contestant": name,
            "install_s": seconds,
            "install_cpu_s": cpu,
            "first_start_s": first,
            "first_start_cpu_s": first_cpu,
            "installed_bytes": size,
            "packages": len(list(environment.glob("lib/*/site-packages/*.dist-info"))),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--before", default="0028123", metavar="COMMIT", help="the last commit without a lock")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        rows.append(measure(name, arguments.before if name == "before" else "HEAD"))
        print(rows[-1], flush=True)
        write_json(RESULTS, {"machine": host_info()["cpu"], "rows": rows})


if __name__ == "__main__":
    main()
