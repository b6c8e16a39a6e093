"""Check installation, parameters, store and versions.

It prints one line for each finding, with what to do. Exit code 0: nothing to fix; 1: something is left to fix.
"""

import argparse

from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    add("--fix", action="store_true", help="fix what can be fixed without a risk, such as the paths of a moved project")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.ops.doctor import examine
    from pipeline.system.host import project_root

    examine(project_root(), arguments.fix)
