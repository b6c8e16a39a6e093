"""Search for parameters that reach the target at a lower cost.

Each trial is a training. A sweep that was stopped is resumed by the same command.
"""

import argparse

from pipeline.commands.arguments import Add, add_slurm, add_sweep, slurm_of
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add("action", nargs="?", default="run", choices=("run", "status", "best", "confirm", "apply", "dashboard"),
        help="run: search; status: list the trials; best: show the best trial; confirm: train the best trials with "
        "more seeds; apply: write the winner into params.yaml; dashboard: open Optuna's; default: run")  # fmt: skip
    add(
        "--top",
        metavar="K",
        type=int,
        help="with confirm: number of trials that are trained again, the best first; default: 3",
    )
    add(
        "--seeds",
        metavar="N",
        type=int,
        help="with confirm: number of seeds for each trial: those after train.seed; default: 3",
    )
    add_sweep(add, without=("applied",))
    add_slurm(add)


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config import params, sections
    from pipeline.sweep import controller, replicate, study

    counts = {"top": arguments.top, "n_seeds": arguments.seeds}
    counts = {name: count for name, count in counts.items() if count is not None}
    if counts and arguments.action != "confirm":
        raise InputError("--top and --seeds need `confirm`: `python -m pipeline sweep confirm --top 3 --seeds 3`")
    slurm = slurm_of(given := params.load_params(), arguments)
    if slurm and arguments.action not in ("run", "confirm"):
        raise InputError(f"sweep {arguments.action} --on slurm: only `sweep` and `sweep confirm` train")
    config = given.overridden(sections.SweepConfig, vars(arguments)).section(sections.SweepConfig)
    actions = {
        "run": lambda config: controller.run_sweep(given, config, slurm),
        "status": controller.print_status,
        "best": controller.print_best,
        "confirm": lambda config: replicate.run_confirm(
            given, config, **{"top": 3, "n_seeds": 3} | counts, slurm=slurm
        ),
        "apply": controller.apply_best,
        "dashboard": controller.open_dashboard,
    }
    with study.translate_storage_errors(config):
        actions[arguments.action](config)
