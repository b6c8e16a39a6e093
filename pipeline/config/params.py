"""Read params.yaml into checked, frozen sections, and name all of its faults at once."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from pipeline.system.errors import InputError

PARAMS = Path("params.yaml")


class Section(BaseModel):
    """One section of params.yaml, XConfig for the section x: frozen, without defaults, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    section_name: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.section_name = cls.__name__.removesuffix("Config").lower()

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number belongs, and a number where true or false does; pydantic takes both."""
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = get_args(kind) or (kind,)
        if isinstance(value, bool) and {int, float} & {*kinds} and bool not in kinds:
            raise ValueError("should be a number")
        if kinds == (bool,) and not isinstance(value, bool):
            raise ValueError("should be true or false")
        return value

    def updated(self, **changes: Any) -> Self:
        """A checked copy with `changes` applied."""
        return self.__class__.model_validate({**self.model_dump(), **changes})


S = TypeVar("S", bound=Section)


class Params:
    """The content of params.yaml; a section is checked once, when it is first asked for."""

    def __init__(self, values: dict[str, Any], path: Path = PARAMS) -> None:
        self.values, self.path = values, path
        self._sections: dict[type[Section], Section] = {}

    def section(self, kind: type[S]) -> S:
        """Return one checked section. Raises InputError that lists all of its faults."""
        self.check(kind)
        return self._sections[kind]  # type: ignore[return-value]

    def check(self, *kinds: type[Section]) -> None:
        """Raise one InputError with the faults of all of `kinds`, if there are any."""
        faults = []
        for kind in kinds:
            if kind in self._sections:
                continue
            if not isinstance(values := self.values.get(kind.section_name), dict):
                faults.append(f"{kind.section_name}: section missing")
                continue
            try:
                self._sections[kind] = kind.model_validate(values)
            except ValidationError as error:
                faults += _describe(kind, error.errors(), values)
        if faults:
            raise InputError(f"{self.path}: " + " ".join("; ".join(faults).split()))  # a key may hold a line break

    def unknown_sections(self, *kinds: type[Section]) -> list[str]:
        """Name the top-level keys that no section reads."""
        names = [kind.section_name for kind in kinds]
        unknown = [key for key in self.values if key not in names]
        return [f"{' '.join(str(key).split())}: unknown section{nearest(key, names)}" for key in unknown]


def load_params(path: Path = PARAMS) -> Params:
    """Read params.yaml. Raises InputError where it is missing, is not YAML or is no mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{path} not found: run from the folder that holds it") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # the latter are PyYAML's own, too: of a date such as 2001-99-99, a tag such as !!bool, brackets without end
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no sections: expected a mapping, got {type(values).__name__}")
    return Params(values, path)


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses duplicate keys, and aliases: a few lines of them expand to gigabytes."""

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


def _describe(kind: type[Section], faults: Sequence[Any], values: dict[str, Any]) -> list[str]:
    """The faults in words: `optim.lr: input should be greater than 0, got -1`."""
    said: dict[str, str] = {}
    for fault in faults:
        location, got = _follow(fault["loc"], values)
        where, what = ".".join([kind.section_name, *map(str, location)]), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            said[where] = f"unknown key{nearest(location[-1], list(kind.model_fields))}"
        elif fault["type"] == "missing":
            said[where] = "missing"
        elif not location:  # a contradiction between keys already names them
            said[where] = what
        else:
            before = f"{said[where].removesuffix(got)} or " if where in said else ""  # it fits no member of a union
            said[where] = f"{before}{what[0].lower()}{what[1:]}{got}"
    return [f"{where}: {what}" for where, what in said.items()]


def _follow(location: tuple[Any, ...], values: Any) -> tuple[tuple[Any, ...], str]:
    """Where a fault is, without the name of a union's member after a plain value, and the value there, in words."""
    for depth, part in enumerate(location):
        if not isinstance(values, dict | list):
            return location[:depth], f", got {values!r}"
        if part in (values if isinstance(values, dict) else range(len(values))):
            values = values[part]
    return location, f", got {values!r}"


def nearest(key: object, names: list[str]) -> str:
    """What to add to the complaint about an unknown key: the name that was probably meant, or all names."""
    return did_you_mean(key, names) or f" (known: {', '.join(names)})"


def did_you_mean(key: object, names: list[str]) -> str:
    """` (did you mean X?)`, or nothing where no name is close."""
    close = get_close_matches(str(key), names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
