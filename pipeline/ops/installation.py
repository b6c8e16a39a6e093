"""Check that the project's Python environment belongs to the project: its programs, and the code that they run."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.ops.checks import Finding
from pipeline.system.host import REINSTALL, SOURCE_ROOT, is_other_code

PROGRAMS = ("totarget", "dvc", "mlflow")  # those that users call
# A script begins with `#!/path/python`; if the path is long, with `#!/bin/sh` and a line that has the path.
INTERPRETER = re.compile(r"/[^\"'\n]*/python[\d.]*")


def examine_installation(root: Path) -> Iterator[Finding]:
    """Check that the programs of .venv start its own Python, and that they run the code of this folder.

    Neither is true in a .venv that was moved or copied with its project. Without .venv, only the code of this process
    is checked.
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
    hint = REINSTALL if is_own else f"`make install` makes {venv}"
    yield from (Finding("to fix", ".venv", f"{what} (was it moved or copied?)", hint) for what in faults)
    if is_own and not faults and not venv.samefile(sys.prefix):
        yield Finding("note", ".venv", f"this is the Python of {sys.prefix}, not of {venv}", "`. .venv/bin/activate`")
    if not faults:
        yield Finding("ok", ".venv", f"{venv if is_own else sys.prefix} runs the code of {root}")


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
