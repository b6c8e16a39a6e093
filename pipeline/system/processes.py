"""Child processes: programs of this code, and DVC."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.system.errors import InputError
from pipeline.system.host import SOURCE_ROOT


def search_path(first: Path, name: str, environment: Mapping[str, str] = os.environ) -> str:
    """The value of PATH or PYTHONPATH with the folder `first` before those of the environment.

    No empty entry is added: it would mean the working directory.
    """
    return os.pathsep.join(filter(None, [str(first), environment.get(name)]))


def start_module(module: str, *arguments: str, line: Any, **options: Any) -> "subprocess.Popen[str]":
    """Start `python -m module` of this code, and write `line` to its standard input as JSON."""
    process = spawn_module(module, *arguments, **options)
    send_line(process, line)
    return process


def spawn_module(module: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """As `start_module`; the child waits for its line until `send_line` writes it.

    The child has its own process group: Ctrl-C reaches only this process, which then stops the child.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": search_path(SOURCE_ROOT, "PYTHONPATH")}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, process_group=0, text=True, **options)


def send_line(process: "subprocess.Popen[str]", line: Any) -> None:
    """Write `line` as JSON to the standard input of a process that `spawn_module` has started."""
    assert process.stdin is not None, "stdin=PIPE"
    process.stdin.write(json.dumps(line) + "\n")
    process.stdin.flush()


def dvc_command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of DVC, with this Python's programs first on the PATH."""
    path = search_path(Path(sys.executable).parent, "PATH")
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
