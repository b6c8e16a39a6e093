"""List the registered versions; promote, roll back or verify them."""

import argparse

from pipeline.commands.arguments import Add, add_model, open_project_registry
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add("action", nargs="?", default="list", choices=("list", "promote", "rollback", "verify"),
        help="list: all versions; promote: make a version the champion; rollback: restore the previous champion; "
        "verify: compare the stored files with their hashes; default: list")  # fmt: skip
    add(
        "version",
        metavar="VERSION",
        nargs="?",
        help="number or alias of a version, for promote and verify; default: for verify, all versions",
    )
    add_model(add)
    add(
        "--retrain",
        action="store_true",
        help="with verify VERSION: train it again, and compare the weights bit for bit",
    )


def run(arguments: argparse.Namespace) -> None:
    from pipeline.registry import catalog, promotion

    action, which = arguments.action, arguments.version
    if action != "verify" and (which is None) == (action == "promote"):
        raise InputError(f"models {action}: {'name a version' if which is None else f'takes no version, got {which}'}")
    if arguments.retrain and (action != "verify" or which is None):
        raise InputError("--retrain needs one version: `python -m pipeline models verify N --retrain`")
    store, name = open_project_registry(arguments.model)
    match action:
        case "list":
            catalog.print_versions(store, name)
        case "promote":
            print(promotion.promote(store, name, which))
        case "rollback":
            print(promotion.rollback(store, name))
        case "verify" if arguments.retrain:
            from pipeline.registry.reproduce import retrain
            from pipeline.system.host import project_root

            print(retrain(store, catalog.find_version(store, name, which), project_root()))
        case "verify" if which is None:
            catalog.verify_versions(store, name)
        case "verify":
            print(catalog.verify(store, catalog.find_version(store, name, which)))
