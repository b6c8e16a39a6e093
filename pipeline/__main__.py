"""The command line: `python -m pipeline`, or `totarget` when the project is installed."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pipeline import __version__
from pipeline.system.entrypoint import Parser, exit_code_of
from pipeline.system.errors import InputError
from pipeline.system.host import REINSTALL, SOURCE_ROOT, is_other_code

COMMANDS = {  # purpose -> commands, in the order of --help
    "Train": ("repro", "learn", "plan"),
    "Use the model": ("generate", "models", "export", "run"),
    "Change parameters": ("recipe", "check"),
    "Search for better parameters": ("sweep", "replicate"),
    "Train on a cluster": ("tokenize", "train", "jobs"),
    "Check and clean up": ("doctor", "clean"),
}


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line. Only the command `chosen` gets its options, since some are slow to import."""
    prog = "totarget" if Path(sys.argv[0]).stem == "totarget" else "python -m pipeline"
    modules = {name: import_module(f"pipeline.commands.{name}") for names in COMMANDS.values() for name in names}
    listing = [f"{group}:\n" + "".join(f"  {name:10} {_summary(modules[name])}\n" for name in names)
               for group, names in COMMANDS.items()]  # fmt: skip
    parser = Parser(
        prog=prog,
        usage="%(prog)s COMMAND [OPTIONS]",
        description="Train a GPT-2 on a text until it reaches a target loss, and use the model.",
        epilog="\n".join([*listing, f"`{prog} COMMAND --help` shows the options of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpt2-to-target {__version__}")
    subparsers = parser.add_subparsers(prog=prog, required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for name, module in modules.items():
        subparser = subparsers.add_parser(name, description=module.__doc__, allow_abbrev=False)
        subparser.set_defaults(command=name, run=module.run)
        if name == chosen and hasattr(module, "add_arguments"):
            module.add_arguments(subparser.add_argument)
    return parser


def _summary(module: ModuleType) -> str:
    """The first line of a module's docstring."""
    return (module.__doc__ or "").partition("\n")[0].rstrip(".")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises InputError if there is no such command or option, or if a value is invalid."""
    argv = sys.argv[1:] if argv is None else argv
    return build_parser(argv[0] if argv else None).parse_args(argv)


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
