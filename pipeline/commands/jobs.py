"""List this project's jobs on Slurm: what runs where, what waits and why; or cancel one."""

import argparse

from pipeline.commands.arguments import Add


def add_arguments(add: Add) -> None:
    add("--cancel", metavar="ID", help="end a job, and those that wait for it; what is saved stays")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.cluster.jobs import cancel, print_jobs

    if arguments.cancel:
        cancel(arguments.cancel)
    else:
        print_jobs()
