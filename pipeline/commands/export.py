"""Export a version for Transformers, llama.cpp or a Space.

The folder that it writes has a README.md that says how to use it.
"""

import argparse
from pathlib import Path

from pipeline.commands.arguments import Add, add_model, open_project_registry
from pipeline.system.errors import InputError
from pipeline.system.words import in_words


def add_arguments(add: Add) -> None:
    add(
        "kind", metavar="KIND", help="hf: for Transformers; gguf: for llama.cpp and Ollama; space: a Hugging Face Space"
    )
    add("folder", metavar="DIR", type=Path, help="folder to write: a new one, or an empty one")
    add_model(add)
    add("--version", metavar="VERSION", default="champion", help="number or alias of the version; default: champion")
    add("--type", metavar="TYPE", help="with gguf: type of the weights, f16, q8_0 or f32; default: f16")


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
    store, name = open_project_registry(arguments.model)
    version = catalog.find_version(store, name, arguments.version)
    files = artifacts.open_version(store, version)
    info = catalog.describe_version(store, version, files)
    options = {"weight_type": arguments.type} if arguments.type else {}
    size = in_words(exports.export_version(arguments.kind, files, info, arguments.folder, **options), "B")
    print(f"{arguments.folder}: {name} version {version.version}, {size}; see its README.md")
