"""Check the environment, params.yaml, MLflow's store and the registered versions, and print how to fix faults."""

import argparse

from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    add("--fix", action="store_true", help="fix what can be fixed safely")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.ops.doctor import examine
    from pipeline.system.host import project_root

    examine(project_root(), arguments.fix)
