"""recipes: named overrides -> params.yaml, in which all else, comments and layout included, stays byte for byte.

A recipe is a mapping like params.yaml with only the keys that it sets, each value on one line, under a comment that
says what it is for. Values are copied as they are written: `1.0e-8` stays `1.0e-8`, which is why this edits the text at
the marks that the YAML parser gives, instead of loading and dumping it.
"""

import re
import shlex
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor

from pipeline.config.params import PARAMS, load_params
from pipeline.system.errors import InputError
from pipeline.system.files import write_text

RECIPES = Path("recipes")
BASE = "laptop"  # has every key that a recipe sets, and its committed value


class Leaf(NamedTuple):
    """A value and where it is written: `gap` and `text` fill [start, end), from its key's colon to its own end."""

    value: Any
    gap: str  # white space; comments too where a list starts on a line of its own
    text: str  # empty where nothing stands for null
    start: int
    end: int

    def __str__(self) -> str:
        return " ".join(self.text.split()) or "null"

    def rewritten(self, text: str) -> str:
        """What fills [start, end) once the value is written as `text`, on its key's line."""
        return f" {text}{self.gap.rstrip()}" if "\n" in self.gap else f"{self.gap or ' '}{text}"


def list_recipes(folder: Path = RECIPES) -> dict[str, str]:
    """Each recipe's name with the first line of its comment."""
    return {path.stem: _read(path).partition("\n")[0].strip("# \r") for path in sorted(folder.glob("*.yaml"))}


def apply_recipe(name: str, params_path: Path = PARAMS, folder: Path = RECIPES) -> str:
    """Write a recipe's values into params.yaml, atomically; return the changes, one `key: old -> new` a line.

    `name` is that of a file in `folder`, which takes back what others of them set, or a path that ends in .yaml, which
    sets its own keys alone. Raises InputError where there is no such recipe, or params.yaml lacks one of its keys.
    """
    recipe_path = find_recipe(name, folder)
    params = _read_leaves(params_path)
    changes: list[tuple[str, Leaf, Leaf]] = []
    for key, new in _values_of(recipe_path, folder).items():
        if key not in params:
            raise InputError(f"{recipe_path}: {key}: no such key in {params_path}{_did_you_mean(key, list(params))}")
        if "\n" in new.text:
            raise InputError(f"{recipe_path}: {key}: write the value on one line, a list as [a, b]")
        if repr(new.value) != repr(params[key].value):  # repr tells 1, a step, from 1.0, a share, and from true
            changes.append((key, params[key], new))
    return _rewrite(params_path, changes) or f"{params_path} is as the recipe {recipe_path.stem} wants it"


def write_values(values: dict[str, Any], params_path: Path = PARAMS) -> str:
    """Write `values`, by dotted key, into params.yaml, atomically; return the changes, one `key: old -> new` a line."""
    params = _read_leaves(params_path)
    texts = {
        key: yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        for key, value in values.items()
    }
    changes = [
        (key, params[key], Leaf(value, "", texts[key], 0, 0))
        for key, value in values.items()
        if repr(value) != repr(params[key].value)
    ]
    return _rewrite(params_path, changes) or f"{params_path} has these values"


def _rewrite(params_path: Path, changes: list[tuple[str, Leaf, Leaf]]) -> str:
    edited = _read(params_path)
    for _, old, new in sorted(changes, key=lambda change: -change[1].start):  # backwards, so that marks stay valid
        edited = edited[: old.start] + old.rewritten(new.text or "null") + edited[old.end :]
    if changes:
        write_text(params_path, edited)
    return "\n".join(f"{key}: {old} -> {new}" for key, old, new in changes)


def as_set(name: str, folder: Path = RECIPES) -> str:
    """A recipe as arguments of `dvc exp run`, quoted for the shell: `-S optim.lr=0.001 -S 'optim.betas=[0.9,0.95]'`."""
    leaves = _values_of(find_recipe(name, folder), folder)
    return " ".join(f"-S {shlex.quote(f'{key}={_as_hydra(leaf.value)}')}" for key, leaf in leaves.items())


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """The file of a recipe given by name or path. Raises InputError that names the nearest, and all there are."""
    path = Path(name) if name.endswith(".yaml") else folder / f"{Path(name).name}.yaml"
    if not path.is_file():
        known = list(list_recipes(folder))
        raise InputError(f"no recipe {name}{_did_you_mean(name, known)}: {folder} holds {', '.join(known) or 'none'}")
    return path


def _values_of(recipe_path: Path, folder: Path) -> dict[str, Leaf]:
    """All that a recipe sets, by dotted key: one of `folder` on top of BASE."""
    base = folder / f"{BASE}.yaml"
    return ({} if recipe_path.parent != folder else _read_leaves(base)) | _read_leaves(recipe_path)


def _did_you_mean(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # read_text would turn CRLF into LF


def _read_leaves(path: Path) -> dict[str, Leaf]:
    """All values of a YAML file by dotted key. Raises InputError where it is no mapping."""
    load_params(path)  # for its complaints
    text = _read(path)
    leaves: dict[str, Leaf] = {}

    def visit(mapping: yaml.MappingNode, prefix: str) -> None:
        for key_node, node in mapping.value:
            key = f"{prefix}{key_node.value}"
            if isinstance(node, yaml.MappingNode):
                visit(node, f"{key}.")
                continue
            colon, start, end = text.index(":", key_node.end_mark.index) + 1, node.start_mark.index, _end_of(node)
            value = SafeConstructor().construct_document(node)
            leaves[key] = Leaf(value, text[colon:start], text[start:end], colon, end)

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "load_params saw a mapping"
    visit(root, "")
    return leaves


def _end_of(node: yaml.Node) -> int:
    """Where a node's text ends; a block list's own mark lies behind the comments that follow it."""
    block_list = isinstance(node, yaml.SequenceNode) and not node.flow_style
    return _end_of(node.value[-1]) if block_list else int(node.end_mark.index)


def _as_hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, which `dvc exp run -S` takes."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list():
            return "[" + ",".join(_as_hydra(item) for item in value) + "]"
        case _:  # a backslash counts only before a quote
            escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", str(value)).replace('"', '\\"')
            return f'"{escaped}"'
