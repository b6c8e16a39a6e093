"""The command line: `python -m pipeline`, or `totarget` when the project is installed."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import InputError
from pipeline.system.host import REINSTALL, SOURCE_ROOT, is_other_code

COMMANDS = (
    "learn", "plan", "recipe", "run", "check", "tokenize", "train", "replicate", "sweep", "jobs", "models", "generate",
    "export", "doctor", "clean",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A parser, also of each command, that raises InputError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        fault = " ".join(message.removeprefix("argument ").split())
        raise InputError(f"{fault}: `{self.prog} --help` shows what is possible")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Only the named command gets its options, since some are slow to import.

    Raises InputError if there is no such command or option, or if a value has the wrong form.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = "totarget" if Path(sys.argv[0]).stem == "totarget" else "python -m pipeline"
    about = "Validate parameters, search for better ones, and use registered models."
    parser = _Parser(prog=prog, description=about)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"pipeline.commands.{name}")
        subparser = subparsers.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        subparser.set_defaults(command=name, run=command.run)
        if name in argv[:1] and hasattr(command, "add_arguments"):
            command.add_arguments(subparser.add_argument)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""

    def command() -> None:
        arguments = parse(argv)
        if arguments.command != "doctor":  # which has a finding for it
            require_own_code()
        arguments.run(arguments)

    return exit_code_of(command)


def require_own_code() -> None:
    """Raise InputError if this folder has a checkout of its own: its stages would run other code than this command."""
    if is_other_code(Path.cwd()):
        hint = f"run `.venv/bin/python -m pipeline`, or repair .venv: {REINSTALL}"
        raise InputError(f"this is the code of {SOURCE_ROOT}, not that of {Path.cwd()}: {hint}")


if __name__ == "__main__":
    sys.exit(main())
