"""Write docs/reference/params.md and docs/reference/command-line.md from params.yaml, the recipes and the parsers.

Run `.venv/bin/python docs/generate.py` after a change of a parameter, a recipe, a flag or a help text. A unit test
fails if the committed pages are not those that this script writes.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

import app  # noqa: E402
from pipeline.__main__ import COMMANDS, build_parser  # noqa: E402
from pipeline.config.recipes import BASE  # noqa: E402
from pipeline.config.sections import SECTIONS, Range  # noqa: E402
from pipeline.model.sampling import Sampling  # noqa: E402
from pipeline.training.optim import OPTIMIZERS, SCHEDULES  # noqa: E402
from pipeline.training.target import RULES  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
WRITTEN = "<!-- written by docs/generate.py: do not edit -->"
FIELDS = {  # SECTION.KEY of params.yaml -> JSON schema of its value
    f"{kind.section_name}.{key}": schema
    for kind in SECTIONS
    for key, schema in kind.model_json_schema()["properties"].items()
}
NAMES = {"optim.name": OPTIMIZERS, "optim.schedule": SCHEDULES, "target.rule": RULES}  # the tables of a key's values
GUIDES = {  # section of params.yaml -> pages about it, below docs/
    "corpus": ("guides/own-text", "guides/tokenizers"),
    "model": ("guides/pretrained", "concepts/folding"),
    "train": ("guides/cluster", "concepts/exactness"),
    "target": ("guides/targets", "concepts/rules"),
    "registry": ("guides/models",),
    "sweep": ("guides/sweep",),
    "slurm": ("guides/cluster",),
}
RANGE = {  # what the keys of a range mean
    "low": "lowest value",
    "high": "highest value; above `low`",
    "log": "true: uniform in the logarithm; `low` must be above 0",
    "step": "distance between two values; null: none; not with `log`",
}
TYPES = {None: "text", int: "whole number", float: "number", Path: "path"}  # type of an argument -> its words
TIME = "a time, such as 90m or 24h"
LONGEST_DEFAULT = 40  # characters; a longer one would make its column too wide


def pages() -> dict[Path, str]:
    """The content of each page that is generated."""
    return {REFERENCE / "params.md": params_page(), REFERENCE / "command-line.md": command_line_page()}


def params_page() -> str:
    """The page of params.yaml: a table for each section, and the recipes."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    comments = dict(read_comments(text))
    defaults = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 (it makes only strings, lists and mappings)
    blocks = [
        "# Parameters",
        WRITTEN,
        "[params.yaml](../../params.yaml) has all parameters, with these defaults and comments. `totarget check` "
        "validates it. [Parameters and recipes](../guides/parameters.md) says how to change and to compare them.",
    ]
    for section, values in defaults.items():
        links = " and ".join(f"[{title(page)}](../{page}.md)" for page in GUIDES.get(section, ()))
        about = comments[section]
        blocks += [f"## {section}", f"{about[0].upper()}{in_code(about[1:])}." + (f" See {links}." if links else "")]
        rows = [
            (f"`{key}`", shown(default), values_of_key(f"{section}.{key}"), in_code(comments[f"{section}.{key}"]))
            for key, default in values.items()
        ]
        blocks.append(table("key default values meaning", rows))
        if section == "sweep":
            ranges = Range.model_json_schema()["properties"]
            blocks += [
                "A range of `space` has these keys. A list of choices has any values of the parameter.",
                table("key values meaning", [(f"`{key}`", in_words(ranges[key]), RANGE[key]) for key in ranges]),
            ]
    blocks += ["## Recipes", "`totarget recipe NAME` writes a recipe into params.yaml.", recipes_table()]
    return "\n\n".join(blocks) + "\n"


def read_comments(text: str) -> Iterator[tuple[str, str]]:
    """The comment of each SECTION and SECTION.KEY of params.yaml: the lines above a key, and the end of its line."""
    section, above = "", []
    for line in text.splitlines():
        if match := re.match(r"( {2}|)(\w+):", line):
            comment = " ".join(filter(None, [*above, line.partition(" # ")[2]]))
            section = section if match[1] else match[2]
            yield f"{section}.{match[2]}" if match[1] else section, comment
            above = []
        elif match := re.match(r" {2}# (.*)", line):
            above.append(match[1])


def shown(default: Any) -> str:
    """A default of params.yaml as it is written there, if it is short."""
    text = f"[{', '.join(default)}]" if isinstance(default, list) else str(default)
    return f"`{text}`" if len(text) < LONGEST_DEFAULT else "see params.yaml"


def values_of_key(key: str) -> str:
    """The values of a key of params.yaml, in words."""
    return ", ".join(f"`{name}`" for name in NAMES[key]) if key in NAMES else in_words(FIELDS[key])


def recipes_table() -> str:
    """Name, purpose and notes of each recipe, from the comment at its beginning; the default recipe comes first."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: (path.stem != BASE, path.stem)):
        comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
        assert comment, f"{path} has no comment"
        purpose, *notes = [line.strip("# ") for line in comment[0].splitlines()]
        rows.append((f"`{path.stem}`", purpose.rstrip("."), " ".join(filter(None, notes))))
    return table("recipe purpose notes", rows)


def command_line_page() -> str:
    """The page of the command line: for each command its usage, its purpose and its arguments."""
    blocks = [
        "# Command line",
        WRITTEN,
        "`. .venv/bin/activate` makes `totarget` available. `python -m pipeline` is the same program. `totarget "
        "--help` lists the commands, and `totarget COMMAND --help` shows the options of one. A value that is not "
        "valid ends a command with one line, before anything is written; [exit codes](exit-codes.md) says with which "
        "code.",
    ]
    for purpose, names in COMMANDS.items():
        blocks.append(f"## {purpose}")
        for name in names:
            blocks += [f"### totarget {name}", *command_blocks(f"totarget {name}", parser_of(name))]
    blocks += [
        "## Serve the model",
        "`make app` runs `python app.py`. [The page and the API](../guides/serving.md) describes what it serves.",
        "### python app.py",
        *command_blocks("python app.py", app.build_parser()),
    ]
    return "\n\n".join(blocks) + "\n"


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    (commands,) = [action for action in build_parser(name)._actions if isinstance(action, argparse._SubParsersAction)]
    parser: argparse.ArgumentParser = commands.choices[name]
    return parser


def command_blocks(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Usage, description and table of arguments of a command."""
    actions = [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]
    places = [place_of(action) for action in actions if not action.option_strings]
    options = ["[OPTIONS]"] if len(places) < len(actions) else []
    yield f"```\n{' '.join([name, *places, *options])}\n```"
    yield in_code(" ".join((parser.description or "").split()))
    if actions:
        yield table("argument values default meaning", map(argument_row, actions))


def place_of(action: argparse.Action) -> str:
    """A positional argument in a usage line."""
    word = "|".join(action.choices) if action.choices else str(action.metavar)
    return f"[{word}]" if action.nargs == "?" else word


def argument_row(action: argparse.Action) -> tuple[str, str, str, str]:
    """Name, values, default and meaning of an argument; its help ends with `; default: ...` if it has a default."""
    assert action.help, action
    meaning, _, default = action.help.partition("; default: ")
    if not action.option_strings:
        name, fallback = str(action.metavar or action.dest.upper()), "none" if action.nargs == "?" else "required"
    else:
        value = [] if action.nargs == 0 else ["slurm" if action.dest == "on" else str(action.metavar or "VALUE")]
        name, fallback = " ".join([*action.option_strings, *value]), "off" if action.nargs == 0 else "none"
    if key := re.fullmatch(r"((sweep|slurm)\.\w+) in params\.yaml", default):
        values = TIME if action.metavar == "TIME" else values_of_key(key[1])
        default = f"[`{key[1]}`](params.md#{key[2]})"
    else:
        values = values_of_argument(action)
        default = f"`{default}`" if default and " " not in default and default != "none" else in_code(default)
    return f"`{name}`", values, default or fallback, in_code(meaning)


def values_of_argument(action: argparse.Action) -> str:
    """The values of an argument that is not a key of params.yaml, in words."""
    if action.nargs == 0:
        return "no value"
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.dest in Sampling.model_fields:
        schema = Sampling.model_json_schema()["properties"][action.dest]
        return in_words(schema.get("items", schema))
    if action.metavar == "TIME":
        return TIME
    return TYPES.get(action.type, "whole number, at least 1")  # type: ignore[call-overload,no-any-return]


def in_words(schema: dict[str, Any]) -> str:
    """The type and the bounds of a JSON schema, in words."""
    if "anyOf" in schema:
        common = {key: value for key, value in schema.items() if key != "anyOf"}
        kinds = [common | kind for kind in schema["anyOf"]]
        kinds = [kind for kind in kinds if kind.get("type") != "integer" or {"type": "number"} not in schema["anyOf"]]
        return ", or ".join(dict.fromkeys(map(in_words, kinds)))
    if choices := schema.get("enum") or [schema[key] for key in ("const",) if key in schema]:
        return ", ".join(f"`{choice}`" for choice in choices)
    words = {
        "integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`",
        "null": "`null`", "object": "a mapping", "array": "a list",
    }[schema["type"]]  # fmt: skip
    low, high = schema.get("minimum"), schema.get("maximum")
    both = low is not None and high is not None
    bounds = [
        ("", f"{number(low)} to {number(high)}" if both else None),
        ("at least ", None if both else number(low)),
        ("above ", number(schema.get("exclusiveMinimum"))),
        ("at most ", None if both else number(high)),
        ("below ", number(schema.get("exclusiveMaximum"))),
    ]
    if schema["type"] == "array":
        return "a list of texts" if schema.get("items", {}).get("type") == "string" else "a list of two numbers"
    return ", ".join([words, *(f"{word}{bound}" for word, bound in bounds if bound is not None)])


def number(bound: float | None) -> str | None:
    """A bound as 0.1, 65,536 or 2^63."""
    if bound is None:
        return None
    power = int(bound).bit_length() - 1
    return f"2^{power}" if power > 20 and bound == 2**power else f"{bound:,.10g}"


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [
        columns := head.split(),
        ["---"] * len(columns),
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_code(text: str) -> str:
    """Text in which keys, paths, URLs and flags are code."""
    special = r"--?[a-zA-Z]|[^\s`(]*(?:://|\*|/|[a-z]_[a-z]|[a-z]\.(?!cpp)[a-z])"  # what begins such a word
    end = r"[,;:)]*(?:\s|$)|[,;:)]*(?<!\.)\.(?:\s|$)"
    parts = re.split("(`[^`]*`)", text)
    return "".join(
        part if part[:1] == "`" else re.sub(rf"(?<![^\s(])((?:{special})[^\s`]*?)(?={end})", r"`\1`", part)
        for part in parts
    )


def title(page: str) -> str:
    """The heading of a page."""
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").partition("\n")[0].strip("# ")


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(ROOT))
