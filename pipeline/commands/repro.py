"""Train with params.yaml, register the model, and show it.

It says which stages of `dvc repro` are due and how long they take, runs them, and shows what was reached.
"""

import argparse
from contextlib import nullcontext

from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    add("--force", action="store_true", help="run every stage again, also those of which nothing has changed")
    add("--dry-run", action="store_true", help="print what is due and how long it takes, and run nothing")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config.recipes import locked_params
    from pipeline.ops.repro import repro

    with nullcontext() if arguments.dry_run else locked_params():
        repro(arguments.force, arguments.dry_run)
