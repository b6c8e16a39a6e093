"""List this project's jobs on Slurm, or cancel one.

It shows where each job runs, and why a job is pending.
"""

import argparse

from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    add("--cancel", metavar="ID", help="cancel this job and those that wait for it; checkpoints and shards are kept")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.cluster.jobs import cancel, print_jobs

    if arguments.cancel is None:
        print_jobs()
    else:
        cancel(arguments.cancel)
