"""Read params.yaml into validated, immutable sections, and report all of its errors at once."""

from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from pipeline.system.errors import InputError, one_line

PARAMS = Path("params.yaml")


class Section(BaseModel):
    """A section of params.yaml; the class XConfig is the section `x`. Immutable, without unknown keys.

    A key has a default only if it is newer than the files of users. A section of such keys alone may be absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    section_name: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.section_name = cls.__name__.removesuffix("Config").lower()

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_not_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject true and false for a number, and a number for true or false; pydantic accepts both."""
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = get_args(kind) or (kind,)
        if isinstance(value, bool) and {int, float} & {*kinds} and bool not in kinds:
            raise ValueError("should be a number")
        if kinds == (bool,) and not isinstance(value, bool):
            raise ValueError("should be true or false")
        return value

    def updated(self, **changes: Any) -> Self:
        """A validated copy with `changes` applied."""
        return self.__class__.model_validate({**self.model_dump(), **changes})


S = TypeVar("S", bound=Section)


class Params:
    """The content of params.yaml; a section is validated once, at its first use."""

    def __init__(self, values: dict[str, Any], path: Path = PARAMS) -> None:
        self.values, self.path = values, path
        self._sections: dict[type[Section], Section] = {}

    def section(self, kind: type[S]) -> S:
        """Return one validated section. Raises InputError with all of its errors."""
        self.check(kind)
        return self._sections[kind]  # type: ignore[return-value]

    def check(self, *kinds: type[Section]) -> None:
        """Raise one InputError with the errors of all of `kinds`, if there are any."""
        errors = []
        for kind in kinds:
            if kind in self._sections:
                continue
            values = self._values_of(kind)
            if not isinstance(values, dict):
                errors.append(f"{kind.section_name}: section missing")
                continue
            try:
                self._sections[kind] = kind.model_validate(values)
            except ValidationError as error:
                errors += _describe(kind, error.errors(), values)
        if errors:
            raise InputError(f"{self.path}: " + " ".join("; ".join(errors).split()))  # a key may hold a line break

    def overridden(self, kind: type[Section], flags: dict[str, Any]) -> "Params":
        """A copy with the values of a section that are given on the command line; other flags are ignored."""
        own, given = self._values_of(kind), {key: flags[key] for key in flags if key in kind.model_fields}
        if not given or not isinstance(own, dict):
            return self
        return Params({**self.values, kind.section_name: {**own, **given}}, Path(f"{self.path} with the command line"))

    def with_values(self, values: dict[str, Any]) -> "Params":
        """A copy with other values, by dotted key, such as optim.lr or sweep.space.optim.lr.low."""
        changed = deepcopy(self.values)
        for key, value in values.items():
            *parts, name = key.split(".")
            own: Any = changed
            for part in parts:
                own[part] = {} if own.get(part) is None else own[part]
                own = own[part]
            own[name] = value
        return Params(changed, self.path)

    def _values_of(self, kind: type[Section]) -> Any:
        """The values of a section, which are none if it is absent and has no required key."""
        values = self.values.get(kind.section_name)
        return {} if values is None and not any(field.is_required() for field in kind.model_fields.values()) else values

    def unknown_sections(self, *kinds: type[Section]) -> list[str]:
        """Describe the top-level keys that are not sections."""
        names = [kind.section_name for kind in kinds]
        unknown = [key for key in self.values if key not in names]
        return [f"{' '.join(str(key).split())}: unknown section{nearest(key, names)}" for key in unknown]


def load_params(path: Path = PARAMS) -> Params:
    """Read params.yaml. Raises InputError if it is missing, is not YAML or is not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{path} not found: run from the project folder") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML raises the last four for a date such as 2001-99-99, a tag such as !!bool, or thousands of brackets
        fault = one_line(error).replace(' in "<unicode string>",', "")
        raise InputError(f"{path} is not YAML: {fault}; `git checkout {path}` restores the committed one") from None
    if not isinstance(values, dict):
        found = "it is empty" if values is None else f"expected a mapping, got {type(values).__name__}"
        raise InputError(f"{path} contains no sections: {found}")
    return Params(values, path)


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that rejects duplicate keys, and aliases, because a few lines of them expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor}: write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _describe(kind: type[Section], errors: Sequence[Any], values: dict[str, Any]) -> list[str]:
    """Format pydantic's errors, such as `optim.lr: input should be greater than 0, got -1`."""
    found: dict[str, str] = {}
    for error in errors:
        location, got = _follow(error["loc"], values)
        where, what = ".".join([kind.section_name, *map(str, location)]), error["msg"].removeprefix("Value error, ")
        what = what.replace("a valid dictionary", "a mapping, such as {key: value}")
        if error["type"] == "extra_forbidden":
            found[where] = f"unknown key{nearest(location[-1], list(kind.model_fields))}"
        elif error["type"] == "missing":
            found[where] = "missing"
        elif not location:  # about several keys, which the message names
            found[where] = what
        elif where in found:  # another member of a union
            found[where] = f"{found[where].removesuffix(got)} or {what.removeprefix('Input should be ')}{got}"
        else:
            found[where] = f"{what[0].lower()}{what[1:]}{got}"
    return [f"{where}: {what}" for where, what in found.items()]


def _follow(location: tuple[Any, ...], values: Any) -> tuple[tuple[Any, ...], str]:
    """The place of an error, without the union members that pydantic adds to it, and `, got VALUE`."""
    for depth, part in enumerate(location):
        parts = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
        if part not in parts:
            return location[: max(1, depth)], f", got {values!r}"  # a missing key is not in `values` either
        values = values[part]
    return location, f", got {values!r}"


def nearest(key: object, names: list[str]) -> str:
    """A hint for an unknown key: the most similar name, or all names."""
    return did_you_mean(key, names) or f" (known: {', '.join(names)})"


def did_you_mean(key: object, names: list[str]) -> str:
    """` (did you mean X?)`, or an empty text if no name is similar."""
    close = get_close_matches(str(key), names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
