"""Write the values of a recipe into params.yaml, and leave every other byte unchanged."""

import re
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor

from pipeline.config.params import PARAMS, did_you_mean, load_params
from pipeline.config.sections import SECTIONS
from pipeline.system.errors import InputError
from pipeline.system.files import locked, write_text

# A recipe is a mapping like params.yaml with only the keys that it sets, each value on one line. Its first line is a
# comment with its purpose. The text of each value is copied to the position that the YAML parser reports, since loading
# and dumping would change comments, layout and the notation of numbers.

RECIPES = Path("recipes")
SPACE = "sweep.space."  # begins the keys of the search space, from which a user may have removed some
BASE = "laptop"  # has every key that any recipe sets, with its value in the committed params.yaml


class Leaf(NamedTuple):
    """A value, its text in the file, and the position of this text, which is empty for some nulls."""

    value: Any
    text: str
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        return " ".join(self.text.split()) or "null"

    @property
    def is_block_list(self) -> bool:
        return self.text.startswith("- ")

    def rewritten(self, new: str) -> str:
        """The text that replaces this one by `new`, with the space that the layout of the file needs before it."""
        return f" {new}" if not self.text else f"  {new}" if self.is_block_list else new


def list_recipes(folder: Path = RECIPES) -> dict[str, str]:
    """Each recipe's name with the first line of its comment."""
    paths = sorted(folder.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].strip("# ") for path in paths}


def apply_recipe(name: str, params_path: Path = PARAMS, folder: Path = RECIPES) -> str:
    """Write a recipe's values into params.yaml, atomically; return the changes, one line `key: old -> new` for each.

    `name` is a recipe of `folder`, or a path that ends in .yaml. A recipe of `folder` also resets the keys that only
    other recipes set; a path sets only its own keys. Raises InputError if there is no such recipe, or if params.yaml
    lacks one of its keys.
    """
    path = find_recipe(name, folder)
    present = _read_leaves(params_path)
    leaves = _without_absent(_recipe_values(path, folder), present, _base_values(path, folder))
    for key, leaf in leaves.items():
        if key not in present:
            raise InputError(f"{path}: {key}: no such key in {params_path}{did_you_mean(key, list(present))}")
        if "\n" in leaf.text or leaf.is_block_list:
            raise InputError(f"{path}: {key}: write the value on one line, a list as [a, b]")
    return _rewrite(params_path, present, leaves) or f"{params_path} already has the values of recipe {path.stem}"


def text_and_model(params_path: Path = PARAMS) -> str:
    """The text and the name of the model in params.yaml, which no recipe of RECIPES sets."""
    present = _read_leaves(params_path)
    return ", ".join(f"{key} {present[key]}" for key in ("corpus.source", "registry.model") if key in present)


def locked_params(params_path: Path = PARAMS) -> AbstractContextManager[None]:
    """Hold the lock of params.yaml, which other commands must not change while the stages read it.

    Raises InputError if there is no such file, RunLocked if another process holds the lock.
    """
    load_params(params_path)  # raises the InputError before there is a lock file
    return locked(params_path.with_name(f"{params_path.name}.lock"))


def write_values(values: dict[str, Any], params_path: Path = PARAMS) -> str:
    """Write `values`, by dotted key, into params.yaml, atomically; return the changes as `apply_recipe` does."""
    present = _read_leaves(params_path)
    leaves = _writable(values, present, params_path)
    return _rewrite(params_path, present, leaves) or f"{params_path} already has these values"


def changed_keys(values: dict[str, Any], params_path: Path = PARAMS) -> list[str]:
    """The keys whose values `write_values` would change. Raises InputError if params.yaml lacks a key to write."""
    present = _read_leaves(params_path)
    return list(_changed(present, _writable(values, present, params_path)))


def _writable(values: dict[str, Any], present: dict[str, Leaf], params_path: Path) -> dict[str, Leaf]:
    """The values to write. Raises InputError if `present` lacks a key of them."""
    leaves = {}
    for key, value in values.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        leaves[key] = Leaf(value, text.removesuffix("...\n").strip())
    leaves = _without_absent(leaves, present, leaves)
    if missing := next((key for key in leaves if key not in present), None):
        section, _, name = missing.partition(".")
        raise InputError(f"{params_path} has no {missing}: add `{name}: {leaves[missing]}` to its section {section}")
    return leaves


def _without_absent(leaves: dict[str, Leaf], present: dict[str, Leaf], base: dict[str, Leaf]) -> dict[str, Leaf]:
    """Leave out keys that `present` lacks and may lack.

    They are those of `base` in the search space, from which a user may have removed them, and those whose value is the
    default, since an older params.yaml has not all keys.
    """
    defaults = {
        f"{section.section_name}.{name}": field.default
        for section in SECTIONS
        for name, field in section.model_fields.items()
        if not field.is_required()
    }
    optional = {key for key in base if key.startswith(SPACE)}
    optional |= {key for key in leaves.keys() & defaults.keys() if repr(leaves[key].value) == repr(defaults[key])}
    return {key: leaf for key, leaf in leaves.items() if key in present or key not in optional}


def recipe_values(name: str, folder: Path = RECIPES) -> dict[str, Any]:
    """The values that a recipe sets, with those of BASE, by dotted key."""
    return {key: leaf.value for key, leaf in _recipe_values(find_recipe(name, folder), folder).items()}


def as_set(name: str, folder: Path = RECIPES) -> str:
    """A recipe as arguments of `dvc exp run`, quoted for the shell: `-S optim.lr=0.001 -S 'optim.betas=[0.9,0.95]'`."""
    leaves = _recipe_values(find_recipe(name, folder), folder)
    return " ".join(f"-S {shlex.quote(f'{key}={_as_hydra(leaf.value)}')}" for key, leaf in leaves.items())


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """The file of a recipe, by name or path. Raises InputError with the most similar name and all recipes."""
    path = Path(name) if name.endswith(".yaml") else folder / f"{Path(name).name}.yaml"
    if not path.is_file():
        known = list(list_recipes(folder))
        raise InputError(f"no recipe {name}{did_you_mean(name, known)}: {folder} contains {', '.join(known) or 'none'}")
    return path


def _recipe_values(path: Path, folder: Path) -> dict[str, Leaf]:
    """All values that a recipe sets, by dotted key; a recipe of `folder` also sets the other values of BASE."""
    return _base_values(path, folder) | _read_leaves(path)


def _base_values(path: Path, folder: Path) -> dict[str, Leaf]:
    """All values of BASE for a recipe of `folder`, none for another one."""
    return _read_leaves(folder / f"{BASE}.yaml") if path.parent == folder else {}


def _read_leaves(path: Path) -> dict[str, Leaf]:
    """All values of a YAML file by dotted key. Raises InputError if it is not a mapping."""
    load_params(path)  # raises the InputError
    text = path.read_bytes().decode()  # with the line ends of the file
    leaves: dict[str, Leaf] = {}

    def visit(mapping: yaml.MappingNode, prefix: str) -> None:
        for key_node, node in mapping.value:
            key = f"{prefix}{key_node.value}"
            if isinstance(node, yaml.MappingNode):
                visit(node, f"{key}.")
            else:
                start, end = node.start_mark.index, _end_of(node)
                leaves[key] = Leaf(SafeConstructor().construct_document(node), text[start:end], start, end)

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "load_params has checked it"
    visit(root, "")
    return leaves


def _end_of(node: yaml.Node) -> int:
    """End of a node's text. For a block list it is that of its last item: its own end mark is after later comments."""
    block_list = isinstance(node, yaml.SequenceNode) and not node.flow_style
    return _end_of(node.value[-1]) if block_list else int(node.end_mark.index)


def _changed(present: dict[str, Leaf], leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    # repr distinguishes 1 (a step), 1.0 (a share) and true, which are equal
    return {key: leaf for key, leaf in leaves.items() if repr(leaf.value) != repr(present[key].value)}


def _rewrite(path: Path, present: dict[str, Leaf], leaves: dict[str, Leaf]) -> str:
    changed = _changed(present, leaves)
    text = path.read_bytes().decode()
    for key in sorted(changed, key=lambda key: -present[key].start):  # backwards, so that positions stay valid
        old = present[key]
        text = text[: old.start] + old.rewritten(changed[key].text or "null") + text[old.end :]
    if changed:
        write_text(path, text)
    return "\n".join(f"{key}: {present[key]} -> {leaf}" for key, leaf in changed.items())


def _as_hydra(value: Any) -> str:
    """A value in the syntax of Hydra's overrides, which `dvc exp run -S` expects."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list():
            return "[" + ",".join(_as_hydra(item) for item in value) + "]"
        case _:  # a backslash is an escape only before a quote
            escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", str(value)).replace('"', '\\"')
            return f'"{escaped}"'
