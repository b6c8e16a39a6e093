"""What docs/reference/stability.md calls stable is still there: parameters, command line and exit codes of 1.0.0."""

import argparse
import json
import re
import runpy
import zipfile
from pathlib import Path

import pytest

from pipeline import __version__
from pipeline.config.params import load_params
from pipeline.ops.params_check import check_params
from pipeline.system import errors
from pipeline.system.errors import BROKEN_PIPE, PipelineError

ROOT = Path(__file__).parents[2]
VERSIONS = ROOT / "tests" / "versions"
# Command -> arguments of 1.0.0, to which later versions add; `json.dump(arguments_of(...))` of all commands wrote it.
ARGUMENTS = json.loads((VERSIONS / "command-line-1.json").read_text())
PARSER_OF = runpy.run_path(str(ROOT / "docs" / "generate.py"))["parser_of"]


def arguments_of(command):
    return sorted(
        name
        for action in PARSER_OF(command)._actions
        if not isinstance(action, argparse._HelpAction)
        for name in action.option_strings or [action.dest]
    )


@pytest.mark.parametrize("command", ARGUMENTS)
def test_each_argument_of_a_command_of_1_0_0_is_still_there(command):
    assert set(ARGUMENTS[command]) <= set(arguments_of(command))


def test_a_params_yaml_of_1_0_0_is_still_valid(tmp_path):
    """It is that of the version of format 1: a new key needs a default, and no key may go or be renamed."""
    with zipfile.ZipFile(VERSIONS / "format-1.zip") as archive:
        (tmp_path / "params.yaml").write_bytes(archive.read("files/artifacts/params.yaml"))
    check_params(load_params(tmp_path / "params.yaml"))


def test_the_page_of_the_exit_codes_has_those_of_the_errors():
    def kinds(kind):
        return [kind, *(found for below in kind.__subclasses__() for found in kinds(below))]

    rows = re.findall(r"^\| ([\d, ]+) \|", (ROOT / "docs/reference/exit-codes.md").read_text(), re.MULTILINE)
    codes = {int(code) for row in rows for code in row.split(",")}
    ours = {kind.exit_code for kind in kinds(PipelineError) if kind.__module__ == errors.__name__}
    assert codes == {0, *ours, 129, 130, BROKEN_PIPE, 143}
    assert ours == set(range(1, 9)), "they are stable: a new error gets a new number"


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__
