"""Train with several seeds, and show the spread of the cost.

The cost is the tokens, steps and seconds until the target. params.yaml has the other parameters.
"""

import argparse

from pipeline.commands.arguments import Add, add_slurm, add_sweep, slurm_of

# Keys of the section `sweep` that a list of trials does not read.
SEARCH_ONLY = ("study", "objective", "space", "micro_batch_tokens", "trials", "patience", "sampler", "pruner",
               "pruner_tolerance", "seed", "applied")  # fmt: skip


def add_arguments(add: Add) -> None:
    add(
        "--seeds",
        metavar="N",
        type=int,
        default=5,
        help="number of seeds, 1 to 1000: train.seed and those after it; default: 5",
    )
    add_sweep(add, without=SEARCH_ONLY)
    add_slurm(add)


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config import params, sections
    from pipeline.sweep import replicate, search_space, study

    given = params.load_params()
    config = search_space.overridden(given, vars(arguments)).section(sections.SweepConfig)
    with study.translate_storage_errors(config):
        replicate.run_replicate(given, config, arguments.seeds, slurm_of(given, arguments))
