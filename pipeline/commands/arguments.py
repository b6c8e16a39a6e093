"""Arguments that several commands have, and what they mean."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.system.errors import InputError, one_line

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.config.sections import SlurmConfig

Add = Callable[..., argparse.Action]  # ArgumentParser.add_argument


def add_slurm(add: Add, without: Sequence[str] = ()) -> None:
    """Add `--on slurm` and a flag for each key of the section `slurm`, which `slurm_of` reads."""
    from pipeline.config.sections import SlurmConfig

    add("--on", choices=("slurm",), help="run as jobs on this Slurm cluster; default: on this machine")
    for name, field in SlurmConfig.model_fields.items():
        if name not in ("options", *without):
            of = {"time_min": _minutes, "partition": _text}.get(name, _yaml)
            text = f"{field.description}; default: slurm.{name} in params.yaml"
            add(
                _flag(name),
                metavar=_flag(name)[2:].upper(),
                dest=f"slurm_{name}",
                type=of,
                default=argparse.SUPPRESS,
                help=text,
            )


def slurm_of(given: "Params", arguments: argparse.Namespace) -> "SlurmConfig | None":
    """The section `slurm` with the flags of the command line; None without `--on slurm`. Raises InputError."""
    from pipeline.config.sections import SlurmConfig

    flags = {key.removeprefix("slurm_"): value for key, value in vars(arguments).items() if key.startswith("slurm_")}
    if arguments.on is None:
        if flags:
            raise InputError(f"{', '.join(map(_flag, flags))}: only with --on slurm")
        return None
    return given.overridden(SlurmConfig, flags).section(SlurmConfig)


def _flag(key: str) -> str:
    """The flag of a key of the section `slurm`."""
    return f"--{key.removesuffix('_min').removesuffix('_gb')}"


def become_dvc(*arguments: str) -> None:
    """Replace this process by DVC."""
    from pipeline.system.processes import dvc_command

    command, environment = dvc_command(*arguments)
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # noqa: S606 (there is no shell)


def count(text: str) -> int:
    """A type of arguments: a number of at least 1."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 1")
    return int(text)


def _minutes(text: str) -> int:
    """Minutes, rounded up, of 90m, 24h or 7d; a plain number could be minutes or seconds."""
    from pipeline.system.words import parse_duration

    try:
        return math.ceil(parse_duration(text if text[-1:].isalpha() else "?") / 60)
    except InputError:
        raise argparse.ArgumentTypeError(f"{text}: give a time above 0, such as 90m or 24h") from None


def add_sweep(add: Add, without: Sequence[str]) -> None:
    """A flag for each key of the section `sweep`."""
    from pipeline.config.sections import SweepConfig

    for name, field in SweepConfig.model_fields.items():
        if name not in without:
            flag, text = f"--{name.replace('_', '-')}", f"{field.description}; default: sweep.{name} in params.yaml"
            of = _text if field.annotation is str else _yaml
            add(flag, metavar="VALUE", type=of, default=argparse.SUPPRESS, help=text)


def _text(text: str) -> str | None:
    """Text, or null; YAML would read the name 2024 as a number."""
    return None if text == "null" else text


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML: {one_line(error)}") from None


def add_model(add: Add) -> None:
    """Add `--model`, the argument of `open_project_registry`."""
    add("--model", metavar="NAME", help="name of the registered model; default: registry.model of params.yaml")


def open_project_registry(model: str | None = None) -> tuple[Any, str]:
    """The registry, and the name of its model: `model`, or that of params.yaml. Raises InputError, ModelMissing."""
    from pipeline.config import params, sections
    from pipeline.registry.catalog import open_registry
    from pipeline.system.host import project_root

    given = params.load_params().overridden(sections.RegistryConfig, {} if model is None else {"model": model})
    name = given.section(sections.RegistryConfig).model
    return open_registry(project_root()), name
