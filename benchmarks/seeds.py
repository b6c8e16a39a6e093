"""Train the recipes of the five published systems, and compare the losses with the published ones.

    python -m benchmarks.seeds [--recipe seed-000 ...] [--steps 30] [--seeds 1 2 3] [--whole] [--draw]

Each recipe has a workspace, `checkpoints/seeds/RECIPE/`, with its params.yaml and its tokens. By default the first
steps are trained with each seed, without checkpoints. Each step is written to benchmarks/results/seeds.json at once.
Seeds whose steps are already there are skipped; a seed that was interrupted starts from its first step again.

`--whole` trains to the recipe's stop rule with the first of `--seeds`, and resumes from its last checkpoint. Our steps
are counted from 1, the published ones from 0. Every call ends with a table and a figure of the file; `--draw` makes
only these.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.seeds_figure import draw, print_table
from benchmarks.throughput import machine_name
from pipeline.config.params import Params, load_params
from pipeline.config.recipes import apply_recipe
from pipeline.data.batches import TrainingData, steps_of
from pipeline.data.token_files import count_tokens
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.entrypoint import run_stage
from pipeline.system.files import locked, read_json, write_text
from pipeline.system.signals import StopSignals
from pipeline.tracking.journal import STEPS, TIMES, read_steps
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.progress import Progress
from pipeline.training.results import write_results
from pipeline.training.run import open_run
from pipeline.training.train import follow, read_config, read_data

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "seeds.json"
PICTURE = ROOT / "docs" / "pictures" / "seeds.png"
NAMES = tuple(f"seed-{i:03d}" for i in range(5))
CURVE_POINTS = 400  # of a whole run; each is the mean of an equal number of steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", nargs="+", default=list(NAMES), help="names of recipes, or paths of variants")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--whole", action="store_true", help="train to the stop rule")
    parser.add_argument("--again", action="store_true", help="also repeat steps that are in the file")
    parser.add_argument("--draw", action="store_true", help="only make the table and the figure")
    arguments = parser.parse_args()
    for recipe in [] if arguments.draw else arguments.recipe:
        if arguments.whole:
            whole_run(recipe, arguments.seeds[0])
            continue
        for seed in arguments.seeds:
            if arguments.again or steps_there(recipe, seed) < arguments.steps:
                first_steps(recipe, seed, arguments.steps)
    results = read_json(RESULTS)
    print_table(results)
    draw(results, PICTURE)


def steps_there(recipe: str, seed: int) -> int:
    """How many of the first steps are in the file already."""
    return len(known_results().get(Path(recipe).stem, {}).get("first_steps", {}).get(str(seed), {}).get("loss", []))


def first_steps(recipe: str, seed: int, n: int) -> None:
    """Train the first `n` steps, and write each to the file."""
    config, machine, text = prepare(recipe, seed)
    state = fresh_state(config.model, text.vocabulary, config.optim, config.train, machine)
    batches = steps_of(1, text.train, config.windows, seed)
    values: dict[str, Any] = {**environment_of(machine), "loss": [], "grad_norm": [], "lr": [], "step_s": []}
    steps = train_steps(state, batches, config.optim.max_steps(config.windows, text.train.size), config.optim, machine)
    for record in islice(steps, n):
        for key in ("loss", "grad_norm", "lr", "step_s"):
            values[key].append(float(f"{getattr(record, key):.6g}"))
        print(f"{recipe}, seed {seed}, step {record.step}: loss {record.loss:.4f}, gradient {record.grad_norm:.3f}, "
              f"{record.step_s:.1f} s", flush=True)  # fmt: skip
        if record.step >= steps_there(recipe, seed):  # does not replace a longer list
            note(recipe, "first_steps", str(seed), values)


def whole_run(recipe: str, seed: int) -> None:
    """Train until the recipe's own rule stops the run, and write its results to the file."""
    config, machine, text = prepare(recipe, seed)
    folder = workspace(recipe)
    models, timing = folder / "models", folder / "reports" / "timing.json"
    with StopSignals() as stop, open_run(config, machine, text, folder / "checkpoints") as run:
        if not run.finished:
            progress = Progress(run.state.step, run.state.tokens, run.max_steps, config.target.loss)
            with closing(progress):
                follow(run, stop, progress.show)
        write_results(run, models, folder / "data" / "tokenizer", timing)
    steps, times = read_steps(models / STEPS), read_steps(models / TIMES)
    results, rule = read_json(models / "run.json")["results"], config.target.rule
    evaluations = {
        key: [[int(step), float(f"{loss:.5g}")] for step, loss in steps[key].dropna().items()]
        for key in ("sliding_loss", "corpus_loss", "validation_loss")
        if key in steps
    }
    note(recipe, "whole", str(seed), {
        **environment_of(machine), "rule": rule, "target_loss": config.target.loss, **{key: results[key] for key in (
            "steps", "tokens", "model_step", "train_tokens", "to_target")},
        "losses": {"batch": float(steps["loss"].iloc[-1]), "average": float(steps["loss"].tail(100).mean()),
                   **{key.removesuffix("_loss"): points[-1][1] for key, points in evaluations.items()}},
        "best_evaluations": {key: min(points, key=lambda point: point[1]) for key, points in evaluations.items()},
        "train_s": round(float(times["train_s"].iloc[-1]), 1), "wall_s": round(float(times["wall_s"].iloc[-1]), 1),
        "curve": thinned(steps["loss"].to_numpy()), **evaluations,
    })  # fmt: skip


def thinned(losses: np.ndarray) -> list[list[float]]:
    """At most CURVE_POINTS pairs: a step, and the mean loss of the steps since the previous pair."""
    every = -(-len(losses) // CURVE_POINTS)
    ends = range(every, len(losses) + 1, every)
    return [[end, float(f"{losses[end - every : end].mean():.5g}")] for end in ends]


def prepare(recipe: str, seed: int) -> tuple[RunConfig, Machine, TrainingData]:
    """Set torch up for the recipe; return its settings with this seed, the machine and the tokens."""
    folder = workspace(recipe)
    params = load_params(folder / "params.yaml")
    params = Params({**params.values, "train": {**params.values["train"], "seed": seed}}, params.path)
    config = read_config(params, folder / "data")
    machine = prepare_machine(config.train, config.flops(count_tokens(folder / "data" / "tokens")))
    return config, machine, read_data(config, machine, folder / "data")


def workspace(recipe: str) -> Path:
    """Return the recipe's folder, with its params.yaml and, from the first call on, its data."""
    folder = ROOT / "checkpoints" / "seeds" / Path(recipe).stem
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "params.yaml", folder)
    for name in ("laptop", recipe):  # laptop resets what another recipe has set in params.yaml
        apply_recipe(name, folder / "params.yaml", ROOT / "recipes")
    if not (folder / "data" / "tokens").is_dir():
        for stage in ("download", "tokenizer", "tokenize"):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment, check=True)
    return folder


def environment_of(machine: Machine) -> dict[str, Any]:
    return {
        "machine": machine_name(),
        "precision": machine.precision,
        "threads": machine.threads,
        "torch": torch.__version__,
        "day": time.strftime("%Y-%m-%d"),
    }


def known_results() -> dict[str, Any]:
    return read_json(RESULTS) if RESULTS.is_file() else {}


def note(recipe: str, kind: str, seed: str, values: dict[str, Any]) -> None:
    """Write a run's figures into RESULTS, atomically, under a lock against other processes."""
    with locked(ROOT / "checkpoints" / "seeds.lock", wait=True):
        results = known_results()
        results.setdefault(Path(recipe).stem, {}).setdefault(kind, {})[seed] = values
        write_text(RESULTS, json.dumps(results) + "\n")


if __name__ == "__main__":
    run_stage(main)
