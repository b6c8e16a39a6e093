"""Compute the fingerprint of a run: one hash of the data, parameters and code that decide its numbers.

The fingerprint names the folder of the run's checkpoints and is a tag of the MLflow run and the registered version. It
links DVC to MLflow, because DVC's outputs must not contain MLflow's random run ids. A run resumes with the same bits
only if the identity's `environment` is equal too.
"""

import ast
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.config.params import Section
from pipeline.system.files import sha256_json
from pipeline.system.host import SOURCE_ROOT, cpu_name

if TYPE_CHECKING:
    from pipeline.system.device import Machine

# The code that determines a number, the step at which a run stops, or the model that is kept: files, or definitions in
# files. Not listed: code that can only refuse a run (checks of parameters and files), code whose effect is in
# `environment`, and code that writes results (a finished run writes them again from its checkpoint).
# tests/unit/tracking/test_fingerprint.py gives the reason for each file that training imports and that is not listed.
DECISIVE = (
    "pipeline/config/sections.py:WindowsConfig.step_windows",
    "pipeline/config/sections.py:WindowsConfig.step_tokens",
    "pipeline/config/sections.py:OptimConfig.max_tokens",
    "pipeline/config/sections.py:OptimConfig.max_steps",
    "pipeline/config/sections.py:steps_in",
    "pipeline/data/batches.py",  # order and content of each step's windows, and the vocabulary of the model
    "pipeline/data/token_files.py:Tokens.read",
    "pipeline/data/token_files.py:Tokens.counts",
    "pipeline/data/vocab.py",
    "pipeline/model/gpt.py",
    "pipeline/model/dropout.py",
    "pipeline/model/loss.py",
    "pipeline/model/fsdp.py",
    "pipeline/model/published.py:load_published",
    "pipeline/model/evaluate.py:BATCH_TOKENS",  # losses that decide the target, the patience and the kept model
    "pipeline/model/evaluate.py:MIN_BATCHES",
    "pipeline/model/evaluate.py:LOSSES",
    "pipeline/model/evaluate.py:text_loss",
    "pipeline/model/evaluate.py:_is_clearly_above",
    "pipeline/model/evaluate.py:_batches",
    "pipeline/system/device.py:Machine.autocast",
    "pipeline/system/device.py:autocast_in",
    "pipeline/system/device.py:prepare_machine",  # deterministic kernels
    "pipeline/system/distributed.py:World",  # which windows a process gets, and the sums over processes
    "pipeline/training/consumers.py:evaluate",
    "pipeline/training/loop.py",
    "pipeline/training/muon.py",
    "pipeline/training/optimizer.py",
    "pipeline/training/optim.py",
    "pipeline/training/run.py:Run.max_steps",
    "pipeline/training/run.py:Run.steps_per_epoch",
    "pipeline/training/run.py:Run.finished",
    "pipeline/training/run.py:Run.steps",
    "pipeline/training/run.py:Run._fresh_state",
    "pipeline/training/target.py",
    "pipeline/training/train.py:read_data",
    "pipeline/training/train.py:follow",
)


IDENTITY = "identity.json"  # in a run's folder


class Identity(TypedDict):
    """The content of identity.json beside a run's checkpoints; also part of models/run.json."""

    fingerprint: str
    data_sha256: str
    params: dict[str, dict[str, Any]]  # section -> values
    sources: dict[str, str]  # entry of DECISIVE -> its source_hash
    environment: dict[str, str | int]
    inexact: list[str]  # resumes that were not exact, and why; if there are any, the run cannot be repeated exactly


def identify(data_sha256: str, sections: Iterable[Section], machine: "Machine") -> Identity:
    """The identity of a run that trains on these data, with these sections of params.yaml and the present code."""
    decisive = _decisive(data_sha256, sections)
    return Identity(
        fingerprint=_fingerprint(decisive),
        data_sha256=data_sha256,
        params=decisive["params"],
        sources=decisive["sources"],
        environment=_environment(machine),
        inexact=[],
    )


def fingerprint_of(data_sha256: str, sections: Iterable[Section]) -> str:
    """The fingerprint that `identify` gives, on any machine."""
    return _fingerprint(_decisive(data_sha256, sections))


def _decisive(data_sha256: str, sections: Iterable[Section]) -> dict[str, Any]:
    params = {section.section_name: section.model_dump(mode="json", exclude={"processes"}) for section in sections}
    return {"data": data_sha256, "params": params, "sources": source_hashes()}


def _fingerprint(decisive: dict[str, Any]) -> str:
    return sha256_json(decisive)[:16]


def source_hashes() -> dict[str, str]:
    """The hash of each entry of DECISIVE."""
    hashes = {}
    for entry in DECISIVE:
        path, _, name = entry.partition(":")
        hashes[entry] = source_hash((SOURCE_ROOT / path).read_text(encoding="utf-8"), name)
    return hashes


def source_hash(text: str, name: str = "") -> str:
    """SHA-256, in hex, of the syntax tree of Python source, or of its definition `name`, such as `Class.method`.

    It ignores formatting, comments, docstrings, annotations, `description=`, calls of print, and the messages of raise
    and assert. Raises KeyError if there is no such definition.
    """
    node: ast.AST = ast.parse(text)
    for part in filter(None, name.split(".")):
        found = [child for child in ast.iter_child_nodes(node) if part in _names_of(child)]
        if not found:
            raise KeyError(name)
        node = found[0]
    return sha256_json(_content(node))


def _names_of(node: ast.AST) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _content(value: Any) -> Any:
    """A syntax tree as nested lists, without empty fields and without the parts that the hash ignores."""
    if isinstance(value, list):
        return [_content(item) for item in value if not _is_message(item)]
    if isinstance(value, ast.Raise) and isinstance(value.exc, ast.Call):
        return ["Raise", _content(value.exc.func)]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = {name: child for name, child in ast.iter_fields(value) if name not in ("annotation", "returns", "kind")}
    if isinstance(value, ast.Assert):
        fields.pop("msg", None)
    return [
        type(value).__name__,
        *([name, _content(child)] for name, child in fields.items() if child not in (None, [])),
    ]


def _is_message(node: Any) -> bool:
    """Whether a node is a docstring, a call of print or an argument `description=`."""
    if isinstance(node, ast.keyword):
        return node.arg == "description"
    value = node.value if isinstance(node, ast.Expr) else None
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "print"
    return isinstance(value, ast.Constant)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two identities, as phrases such as `optim.lr 0.001 -> 0.002`."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key.removeprefix('params.').removeprefix('environment.')} {old.get(key)} -> {new.get(key)}"
        if not key.startswith("sources.")
        else f"{key.removeprefix('sources.')} changed"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ("fingerprint", "inexact")
    ]


def _environment(machine: "Machine") -> dict[str, str | int]:
    import torch

    device = machine.device.type
    # The order in which a CPU sums a product depends on its instruction set; virtual CPUs share names.
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


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name in value for key, leaf in flatten(value[name], f"{prefix}.{name}".strip(".")).items()}
