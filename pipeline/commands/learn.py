"""Train a model of your own text, register it, and show it.

It chooses tokenizer, model, target and epochs for the text, writes them into params.yaml, and runs `dvc repro`. The
same command resumes a training that was stopped, and does nothing if the target was reached.
"""

import argparse
import tempfile
from pathlib import Path

from pipeline.commands import plan
from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    plan.add_arguments(add)
    add("--dry-run", action="store_true", help="print the plan, and do not train")
    add("--yes", action="store_true", help="train without asking first")


def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        made = plan.planned(arguments, Path(folder))
        print(made, flush=True)
        if not arguments.dry_run:
            from pipeline.ops.learn import learn

            learn(made, arguments.in_place, arguments.yes)
