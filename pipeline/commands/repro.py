"""Run the stages that are due (`dvc repro`): forecast and outcome."""

import argparse

from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    add("--force", action="store_true", help="run every stage again, also if nothing has changed")
    add("--dry-run", action="store_true", help="only print what is due and how long it takes")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.ops.repro import repro

    repro(arguments.force, arguments.dry_run)
