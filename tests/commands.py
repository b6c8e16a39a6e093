"""Commands in documents: whether they exist, without running them."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import yaml
from dvc.cli.parser import get_main_parser

import app
from pipeline.__main__ import parse
from pipeline.system.errors import InputError

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def check(line, complete=True):
    """Whether a line begins with a program that is known here; raises if its command, or a flag of it, does not exist.

    A single capital letter is a number, such as N in `--workers N`. A command that is not complete may lack arguments.
    """
    line = re.sub(r"^(export )?([A-Z_]+=\S* )*(\S*/)?", "", line.removesuffix("&").strip())
    if not re.match("(totarget|python|dvc|make) ", line):
        return False
    match [re.sub(r"^[A-Z]$", "1", word) for word in shlex.split(line, comments=True)]:
        case ["totarget", *arguments] | ["python", "-m", "pipeline", *arguments]:
            _parse(parse, arguments, complete)
        case ["python", "app.py", *arguments]:
            _parse(app.build_parser().parse_args, arguments, complete)
        case ["python", "-m", module, *arguments]:
            source = ROOT / f"{module.replace('.', '/')}.py"
            assert source.is_file() or find_spec(module.removesuffix(".NAME")), line
            flags = [word for word in arguments if word.startswith("--") and source.is_file()]
            assert all(f'"{flag}"' in source.read_text() for flag in flags), line
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), line
        case ["dvc", command, *arguments]:
            if complete or arguments:
                _parse(get_main_parser().parse_args, [command, *arguments], complete)
            if command in ("repro", "commit"):
                assert {word for word in arguments if not word.startswith("-")} <= STAGES.keys(), line
        case ["make", "-C", _, *arguments] | ["make", *arguments]:
            for name, _, value in (word.partition("=") for word in arguments):
                exists = f"$({name}" in MAKEFILE if value else re.search(rf"^{name}:", MAKEFILE, re.MULTILINE)
                assert exists, line
    return True


def _parse(parser, arguments, complete):
    try:
        parser(arguments)
    except SystemExit as stopped:  # with 0 after --help
        if stopped.code:
            raise
    except InputError as error:
        if complete or "arguments are required" not in str(error):
            raise


def commands_in(text):
    """The commands of a page: those in code blocks, with True, and those in sentences and comments, which may
    lack arguments."""
    blocks = re.findall(r"^ *```(?:bash|sh|console)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    phrases = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*$", "", text, flags=re.MULTILINE))
    for line, complete in [*((line, True) for line in lines), *((phrase, False) for phrase in phrases)]:
        for part in re.split(" && |; | \\| ", line.partition(" # ")[0]):
            yield part.strip(), complete
