"""Check that the project's Python environment belongs to the project: its programs, and the code that they run."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.ops.checks import Finding
from pipeline.system.host import REINSTALL, SOURCE_ROOT, is_other_code

PROGRAMS = ("totarget", "dvc", "mlflow")  # those that users call
# A script begins with `#!/path/python`; if the path is long, with `#!/bin/sh` and a line that has the path.
INTERPRETER = re.compile(r"/[^\"'\n]*/python[\d.]*")


def examine_installation(root: Path) -> Iterator[Finding]:
    """Check that the programs of .venv start its own Python, and that they run the code of this folder.

    Neither is true in a .venv that was moved or copied with its project. It is an error if this process uses it, and a
    note otherwise, as in a container that mounts the project. Without .venv, only the code of this process is checked.
    """
    venv, faults = root / ".venv", []
    if is_own := (venv / "pyvenv.cfg").is_file():
        programs = venv / "bin"
        if elsewhere := {name: python for name in PROGRAMS if (python := _foreign_python(programs / name))}:
            faults.append(f"{', '.join(elsewhere)} in {programs} start {min(elsewhere.values())}, not its own Python")
        if (code := _editable(venv)) and not (code.is_dir() and code.samefile(root)):
            faults.append(f"the programs in {programs} run the code of {code}, not that of {root}")
    if is_other_code(root) and not faults:
        faults.append(f"this is the code of {SOURCE_ROOT}, not that of {root}")
    in_use = is_own and venv.samefile(sys.prefix)
    hint, works = REINSTALL if is_own else f"`make install` makes {venv}", not is_other_code(root)
    for what in faults:
        mark: Literal["note", "to fix"] = "note" if works and not in_use else "to fix"
        yield Finding(mark, ".venv", f"{what} (was it moved or copied?)", hint)
    if is_own and not in_use and not faults:
        yield Finding("note", ".venv", f"this is the Python of {sys.prefix}, not of {venv}", "`. .venv/bin/activate`")
    if works and not (in_use and faults):
        yield Finding("ok", ".venv", f"{sys.prefix} runs the code of {root}")


def _foreign_python(script: Path) -> str | None:
    """The Python that a script starts, if it is of another environment than the script."""
    try:
        first, second, *_ = [*script.read_text(encoding="utf-8", errors="replace").split("\n", 2), ""]
    except OSError:  # missing: the check of the packages says so
        return None
    found = INTERPRETER.search(second if first == "#!/bin/sh" else first)
    if found is None or Path(found[0]).parent.resolve() == script.parent.resolve():
        return None
    return found[0]


def _editable(venv: Path) -> Path | None:
    """The folder whose code an editable installation in `venv` runs; None if there is no such installation."""
    for record in venv.glob("lib/python*/site-packages/gpt2_to_target-*.dist-info/direct_url.json"):
        found = json.loads(record.read_text(encoding="utf-8"))
        if found.get("dir_info", {}).get("editable"):
            return Path(url2pathname(urlsplit(found["url"]).path))
    return None
