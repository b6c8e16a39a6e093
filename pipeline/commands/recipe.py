"""List the recipes, or write one into params.yaml.

A recipe is a set of parameters that was tried. It resets the keys that other recipes set, and shows each change.
"""

import argparse

from pipeline.commands.arguments import Add
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add("name", metavar="NAME", nargs="?", help="name of a recipe, or path of a YAML file; default: list the recipes")
    add("--as-set", action="store_true", help="print the recipe as -S arguments of `dvc exp run`, and change nothing")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config.recipes import apply_recipe, as_set, list_recipes, locked_params, text_and_model

    if arguments.name is None:
        if arguments.as_set:
            raise InputError("recipe --as-set: name a recipe")
        if not (recipes := list_recipes()):
            raise InputError("no recipes/ here: run from the project's folder")
        for name, comment in recipes.items():
            print(f"{name:12} {comment}")
    elif arguments.as_set:
        print(as_set(arguments.name))
    else:
        with locked_params():
            print(apply_recipe(arguments.name))
            print(f"text and model: {text_and_model()}")
