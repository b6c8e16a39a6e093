"""Train as `dvc repro train` does, here or in a job on Slurm, on one node or several."""

import argparse

from pipeline.commands.arguments import Add, add_slurm, become_dvc, slurm_of
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add_slurm(add)
    add("--elastic", action="store_true", help="with --on slurm: resume in another environment, inexactly")
    add("--commit", metavar="DIGEST", help="only record the training with these parameters in dvc.lock")


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
