"""The doctor prints its checks' findings, applies fixes if asked, and counts the errors that are left."""

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.ops import doctor
from pipeline.ops.checks import Finding
from pipeline.ops.doctor import examine, examine_store
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import InputError, RunLocked

CHECKS = [f"examine_{name}" for name in "installation packages tools params store".split()]  # in their order
ONE = "1 to fix, see above"
ONE_OF_TWO = "2 to fix, see above; `python -m pipeline doctor --fix` fixes 1 of them"


def fail(error):
    raise error


def one(*findings, error=None):
    """A check with these findings, which then fails."""

    def examine_one(root):
        yield from findings
        if error:
            raise error

    return examine_one


FIXABLE = Finding("to fix", "x", "a", "b", lambda: "done")
UNFIXABLE = Finding("to fix", "y", "c", "two\nlines")
LOCKED = Finding("to fix", "x", "a", "b", lambda: fail(RunLocked("held by process 7")))
DENIED = Finding("to fix", "x", "a", "b", lambda: fail(PermissionError(13, "not yours")))


@pytest.mark.parametrize(
    ("fix", "check", "lines", "error"),
    [
        (False, one(), [], None),
        (True, one(Finding("note", "git", "a note", "do it")), ["note    git        a note: do it"], None),
        (False, one(FIXABLE, UNFIXABLE), ["to fix  x          a: b", "to fix  y          c: two lines"], ONE_OF_TWO),
        (True, one(FIXABLE), ["fixed   x          done"], None),
        (True, one(UNFIXABLE), ["to fix  y          c: two lines"], ONE),
        (True, one(LOCKED), ["to fix  x          a; not fixed: held by process 7"], ONE),
        (True, one(DENIED), ["to fix  x          a; not fixed: [Errno 13] not yours"], ONE),
        (
            False,
            one(FIXABLE, error=InputError("odd")),
            ["to fix  x          a: b", "to fix  one        odd"],
            ONE_OF_TWO,
        ),
        (False, one(error=PermissionError(13, "no")), ["to fix  one        [Errno 13] no"], ONE),
    ],
)
def test_findings_fixes_and_the_exit_code(fix, check, lines, error, monkeypatch, capsys):
    last = Finding("ok", "last", "a check after one that fails")
    for name, replaced in zip(CHECKS, (check, one(), one(), one(), one(last)), strict=True):
        monkeypatch.setattr(doctor, name, replaced)
    assert exit_code_of(lambda: examine(Path(), fix)) == (1 if error else 0)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [*lines, str(last)]
    assert printed.err == (f"error: {error}\n" if error else "")


def test_a_store_that_does_not_exist_is_a_note_and_is_not_created(tmp_path):
    assert [finding.mark for finding in examine_store(tmp_path)] == ["note"]
    assert not [*tmp_path.iterdir()]
    (tmp_path / "mlflow.db").touch()
    assert [finding.mark for finding in examine_store(tmp_path)] == ["note"]
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("mlflow.db", 0)]


@pytest.mark.parametrize("arguments", [[], ["--fix"]])
def test_the_command_passes_the_option_fix(monkeypatch, arguments):
    called = []
    monkeypatch.setattr(doctor, "examine", lambda root, fix: called.append(fix))
    assert main(["doctor", *arguments]) == 0
    assert called == [bool(arguments)]
