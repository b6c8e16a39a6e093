"""Learn a text of your own: plan, write params.yaml, run `dvc repro`, and show what was reached."""

import argparse
import tempfile
from pathlib import Path

from pipeline.commands import plan
from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    plan.add_arguments(add)
    add("--dry-run", action="store_true", help="only print the plan")
    add("--yes", action="store_true", help="do not ask before training")


def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        made = plan.planned(arguments, Path(folder))
        print(made, flush=True)
        if not arguments.dry_run:
            from pipeline.ops.learn import learn

            learn(made, arguments.in_place, arguments.yes)
