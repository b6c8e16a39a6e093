"""Write a registered version as a folder for Transformers (hf), or as a Hugging Face Space with the app (space)."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import Add, open_project_registry
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add("kind", help="hf, space, or another of EXPORTS in pipeline/registry/export.py")
    add("folder", metavar="DIR", type=Path, help="a new folder, or an empty one")
    add("--version", default="champion", help="a number or an alias; champion by default")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.registry import artifacts, catalog
    from pipeline.registry import export as exports

    if arguments.kind not in exports.EXPORTS:
        raise InputError(f"export {arguments.kind}: unknown, choose one of {', '.join(exports.EXPORTS)}")
    exports.require_empty(arguments.folder)
    store, name = open_project_registry()
    version = catalog.find_version(store, name, arguments.version)
    files, info = artifacts.open_version(store, version), catalog.describe_version(store, version)
    size_mb = exports.export_version(arguments.kind, files, info, arguments.folder) / 1e6
    print(f"{arguments.folder}: {name} version {version.version}, {size_mb:,.0f} MB; see its README.md")
