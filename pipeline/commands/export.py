"""Write a registered version as a folder for Transformers (hf) or llama.cpp (gguf), or as a Hugging Face Space."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import Add, open_project_registry
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add("kind", help="hf, gguf, space, or another of EXPORTS in pipeline/registry/export.py")
    add("folder", metavar="DIR", type=Path, help="a new folder, or an empty one")
    add("--version", default="champion", help="a number or an alias; champion by default")
    add("--type", metavar="TYPE", help="the weights of gguf: f16 by default, q8_0, or f32")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.registry import artifacts, catalog
    from pipeline.registry import export as exports
    from pipeline.registry.gguf_file import WEIGHT_TYPES

    if arguments.kind not in exports.EXPORTS:
        raise InputError(f"export {arguments.kind}: unknown, choose one of {', '.join(exports.EXPORTS)}")
    if arguments.type and arguments.kind != "gguf":
        raise InputError(f"export {arguments.kind}: --type is an option of export gguf only")
    if arguments.type and arguments.type not in WEIGHT_TYPES:
        raise InputError(f"--type {arguments.type}: unknown, choose one of {', '.join(WEIGHT_TYPES)}")
    exports.require_empty(arguments.folder)
    store, name = open_project_registry()
    version = catalog.find_version(store, name, arguments.version)
    files, info = artifacts.open_version(store, version), catalog.describe_version(store, version)
    options = {"weight_type": arguments.type} if arguments.type else {}
    size_mb = exports.export_version(arguments.kind, files, info, arguments.folder, **options) / 1e6
    print(f"{arguments.folder}: {name} version {version.version}, {size_mb:,.0f} MB; see its README.md")
