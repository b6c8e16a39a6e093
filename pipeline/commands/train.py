"""Train, on this machine or as a job on Slurm.

Without options it is `dvc repro train`.
"""

import argparse

from pipeline.commands.arguments import Add, add_slurm, become_dvc, slurm_of
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add_slurm(add)
    add(
        "--elastic",
        action="store_true",
        help="with --on slurm: resume although the kind of node has changed; the run is then marked inexact",
    )
    add("--commit", metavar="DIGEST", help=argparse.SUPPRESS)  # of the job itself: record the training in dvc.lock


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config.params import load_params

    slurm = slurm_of(given := load_params(), arguments)
    if arguments.commit:
        from pipeline.ops.on_slurm import commit_training

        commit_training(given, arguments.commit)
    elif slurm:
        from pipeline.ops.on_slurm import train_on_slurm

        train_on_slurm(given, slurm, arguments.elastic)
    elif arguments.elastic:
        raise InputError("--elastic without --on slurm: `python -m stages.train --elastic && dvc commit -f train`")
    else:
        become_dvc("repro", "train")
