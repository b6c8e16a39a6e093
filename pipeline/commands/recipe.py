"""Write a recipe into params.yaml, or print it."""

import argparse

from pipeline.commands.arguments import Add
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add("name", nargs="?", help="a file of recipes/, without .yaml; default: list the recipes")
    add("--as-set", action="store_true", help="only print the recipe, as -S arguments of `dvc exp run`")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config.recipes import apply_recipe, as_set, list_recipes

    if arguments.name is None:
        if not (recipes := list_recipes()):
            raise InputError("no recipes/ here: run from the project's folder")
        for name, comment in recipes.items():
            print(f"{name:12} {comment}")
    else:
        print((as_set if arguments.as_set else apply_recipe)(arguments.name))
