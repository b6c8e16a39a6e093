"""fingerprint: data, parameters and code that decide a run's numbers -> one name for it.

The fingerprint names the folder of the run's checkpoints and tags the MLflow run and the registered version; it is the
link between DVC, which must not see random run ids, and MLflow. To go on from a checkpoint with the same bits, the
machine's side must agree too; that is the identity's `environment`.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from pipeline.config.params import Section
from pipeline.system.device import Machine
from pipeline.system.files import sha256_file, sha256_json
from pipeline.system.host import SOURCE_ROOT, cpu_name

PACKAGES = ("pipeline", "stages")


class Identity(TypedDict):
    """Who a run is; written beside its checkpoints and into models/run.json."""

    fingerprint: str
    data_sha256: str
    params: dict[str, dict[str, Any]]  # section -> values
    sources: dict[str, str]  # file -> SHA-256
    environment: dict[str, str | int]
    inexact: list[str]  # how the environment changed in the middle of the run, which then cannot be repeated exactly


def identify(data_sha256: str, sections: Iterable[Section], machine: Machine) -> Identity:
    """Identify the run that `sections` of params.yaml describe, on the data and the code that are here."""
    root = SOURCE_ROOT
    params = {section.section_name: section.model_dump(mode="json", exclude={"processes"}) for section in sections}
    sources = {path: sha256_file(root / path) for path in sources_reachable_from("pipeline/training/loop.py", root)}
    decisive = {"data": data_sha256, "params": params, "sources": sources}
    return Identity(
        fingerprint=sha256_json(decisive)[:16],
        data_sha256=data_sha256,
        params=params,
        sources=sources,
        environment=_environment(machine),
        inexact=[],
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one phrase each, such as `optim.lr 0.001 -> 0.002`."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key.removeprefix('params.').removeprefix('environment.')} {old.get(key)} -> {new.get(key)}"
        if not key.startswith("sources.")
        else f"{key.removeprefix('sources.')} changed"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ("fingerprint", "inexact")
    ]


def sources_reachable_from(path: str, root: Path) -> list[str]:
    """Our own source files that importing `path` loads, itself included, as sorted paths relative to `root`."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += _imports(root / path, root)
    return sorted(found)


def _imports(path: Path, root: Path) -> list[str]:
    """Files of the first-party modules that a file's import statements name, wherever they stand in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = []
    for module in modules:
        parts = module.split(".")
        if parts[0] in PACKAGES:
            files += [Path(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)] + [
                Path(*parts).with_suffix(".py")
            ]
    return [file.as_posix() for file in files if (root / file).is_file()]


def _environment(machine: Machine) -> dict[str, str | int]:
    device = machine.device.type
    # One kind of CPU adds up a product in another order than the next, and virtual ones share names.
    amx = " AMX" * torch.cpu._is_amx_tile_supported()
    cpu = f"{torch.backends.cpu.get_cpu_capability()}{amx}, {cpu_name()}"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {
        "torch": torch.__version__,
        "device": f"{device} {name}",
        "precision": machine.precision,
        "threads": machine.threads,
        "compiled": machine.compiled,
        "processes": machine.world.size,
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name in value for key, leaf in _flat(value[name], f"{prefix}.{name}".strip(".")).items()}
