"""Compare this project with nanoGPT's settings for characters of Tiny Shakespeare: the cost of a held-out loss.

    python -m benchmarks.nanogpt [--setting cpu gpu] [--slice 10] [--seed 1] [--json FILE]

`nanoGPT's` is a plain loop with the hyper-parameters that nanoGPT publishes for this text, in its file
config/train_shakespeare_char.py and, for `cpu`, in its README: AdamW, warm-up and cosine, random windows, fp32 on a
CPU. Its model is this project's GPT without biases, as nanoGPT's. `ours` is the recipe of the same shape, context and
data. Both train in turn, for --slice seconds each, in processes of their own, of which one is idle while the other
runs. So both get the same share of a loaded machine. Evaluations take no training time.

The target is compared with the loss over the whole held-out text in fixed windows, which is the rule `validation`.
nanoGPT estimates it on random windows of the same text: the table has that too, with as many windows as nanoGPT takes.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.seeds import prepare
from benchmarks.throughput import machine_name, synchronise
from pipeline.data.batches import Split, TrainingData, fixed_windows, make_batch, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model.evaluate import text_loss
from pipeline.model.gpt import GPT
from pipeline.system.device import Machine
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps


class Setting(NamedTuple):
    """A published setting of nanoGPT, and the recipe of the same shape."""

    recipe: str
    target: float  # published validation loss
    steps: int
    batch: int  # windows in a step
    eval_batches: int  # of its estimate of the loss
    dropout: float
    warmup: int = 100
    lr: float = 1e-3
    min_lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def lr_at(self, step: int) -> float:
        """The learning rate at a step, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2


SETTINGS = {
    "cpu": Setting("shakespeare-char-cpu", target=1.88, steps=2000, batch=12, eval_batches=20, dropout=0.0),
    "gpu": Setting("shakespeare-char", target=1.4697, steps=5000, batch=64, eval_batches=200, dropout=0.2),
}
EVALUATIONS = 40  # of a run of nanoGPT's


class Point(NamedTuple):
    """An evaluation of a run; losses are in nats per token."""

    step: int
    tokens: int
    train_s: float
    loss: float  # over the whole held-out text, in fixed windows
    estimate: float  # on random windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["cpu"])
    parser.add_argument("--slice", type=float, default=10, help="seconds of training before it is the other's turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine_name(), "torch": torch.__version__, "seed": arguments.seed}
    for name in arguments.setting:
        print(f"\n{name}, target {SETTINGS[name].target} on {report['machine']}, torch {torch.__version__}", flush=True)
        curves = run_in_turn(name, arguments.seed, arguments.slice)
        report[name] = {who: summary_of(curve, SETTINGS[name].target) for who, curve in curves.items()}
        print_table(report[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def run_in_turn(setting: str, seed: int, slice_s: float) -> dict[str, list[Point]]:
    """Train both to their ends, and return their evaluations."""
    prepare(SETTINGS[setting].recipe, seed)  # once, so that both processes find the tokens
    runners = {name: Runner(name, setting, seed) for name in RUNS}
    curves: dict[str, list[Point]] = {name: [] for name in RUNS}
    while not all(runner.finished for runner in runners.values()):
        for name, runner in runners.items():
            for point in [] if runner.finished else runner.train(slice_s):
                curves[name].append(point)
                print(f"{name}: step {point.step}, {point.tokens:,} tokens, {point.train_s:.1f} s: held-out loss "
                      f"{point.loss:.4f}, on random windows {point.estimate:.4f}", flush=True)  # fmt: skip
    return curves


def ours(config: RunConfig, machine: Machine, data: TrainingData, _: Setting) -> Iterator[tuple[GPT, int, float, bool]]:
    """Yield the model, the tokens so far, the step's seconds, and whether an evaluation is due."""
    state = fresh_state(config.model, data.vocabulary, config.optim, config.train, machine)
    batches = steps_of(1, data.train, config.windows, config.train.seed)
    max_steps = config.optim.max_steps(config.windows, data.train.size)
    for record in train_steps(state, batches, max_steps, config.optim, machine):
        is_due = record.step % (config.target.eval_interval or data.train.size) == 0 or record.step == max_steps
        yield state.model, record.tokens, record.step_s, is_due


def plain(
    config: RunConfig, machine: Machine, data: TrainingData, setting: Setting
) -> Iterator[tuple[GPT, int, float, bool]]:
    """A plain loop with nanoGPT's hyper-parameters; yields what `ours` yields."""
    shape = config.model.updated(dropout=setting.dropout, vocab_size=data.vocabulary.size)
    length, text = shape.block_size, data.train
    torch.manual_seed(config.train.seed)
    model = GPT(shape, data.vocabulary, compiled=machine.device.type == "cuda").initialise(config.train.seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = None
    model.to(machine.device).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [
        {"params": matrices, "weight_decay": setting.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=setting.betas, fused=machine.device.type == "cuda")
    random = np.random.default_rng(config.train.seed)
    for step in range(1, setting.steps + 1):
        began = time.perf_counter()
        batch = make_batch(text, random_windows(text, setting.batch, length, random), length)
        for group in optimizer.param_groups:
            group["lr"] = setting.lr_at(step)
        optimizer.zero_grad(set_to_none=True)
        with machine.autocast():
            loss = model.loss(batch.inputs, batch.targets, batch.n_targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)
        optimizer.step()
        synchronise()
        seconds = time.perf_counter() - began
        yield model, step * setting.batch * length, seconds, step % (setting.steps // EVALUATIONS) == 0


RUNS = {"nanoGPT's": plain, "ours": ours}


def with_own_ids(text: Split) -> Split:
    """The text in ids of its characters alone, as nanoGPT encodes it; our tokenizer also has an id for each byte."""
    ids = text.vocabulary.fold(torch.from_numpy(text.tokens.read(0, text.size).astype(np.int64)))
    n_used = len(text.vocabulary.used)
    tokens = Tokens(text.tokens.name, [ids.numpy().astype(np.uint16)], n_used)
    return Split(tokens, Vocabulary.full(n_used), text.device)


def random_windows(text: Split, n: int, length: int, random: np.random.Generator) -> np.ndarray:
    """`n` windows at random places, (n, 2), as `make_batch` takes them."""
    starts = random.integers(text.size - length, size=n)
    return np.stack([starts, np.zeros_like(starts)], axis=1)


class Runner:
    """A run in a process of its own, controlled through a pipe."""

    def __init__(self, name: str, setting: str, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, setting, seed), daemon=True).start()
        theirs.close()  # if the process dies, `recv` raises EOFError
        self.finished = False
        self._pipe.recv()  # waits until it is built

    def train(self, seconds: float) -> list[Point]:
        """Train for about so long, or to the end; return the evaluations."""
        self._pipe.send(seconds)
        self.finished, points = self._pipe.recv()
        return [Point(*point) for point in points]


def serve(pipe: Connection, name: str, which: str, seed: int) -> None:
    """Train in slices as asked; answer each time with whether the run is finished, and its evaluations."""
    setting = SETTINGS[which]
    config, machine, data = prepare(setting.recipe, seed)
    assert data.validation is not None, "the recipe holds out a part of the text"
    if name != "ours":  # as nanoGPT does
        machine = machine._replace(precision="bf16" if machine.device.type == "cuda" else "fp32")
        train, validation = with_own_ids(data.train), with_own_ids(data.validation)
        data = replace(data, train=train, validation=validation, vocabulary=train.vocabulary)
    steps = enumerate(RUNS[name](config, machine, data, setting), 1)
    pipe.send("ready")
    train_s, finished = 0.0, False
    while not finished:
        until, points, finished = train_s + pipe.recv(), [], True
        for step, (model, tokens, seconds, is_due) in steps:
            train_s += seconds
            if is_due:
                points.append(evaluate(model, machine, data.validation, setting, step, tokens, train_s))
            if train_s >= until:
                finished = False
                break
        pipe.send((finished, points))


def evaluate(
    model: GPT, machine: Machine, text: Split, setting: Setting, step: int, tokens: int, train_s: float
) -> Point:
    """Measure the held-out loss in both ways."""
    length = model.config.block_size
    samples = random_windows(text, setting.eval_batches * setting.batch, length, np.random.default_rng(step))
    model.eval()
    losses = [text_loss(model, text, windows, length, machine.autocast()).loss
              for windows in (fixed_windows(text.size, length), samples)]  # fmt: skip
    model.train()
    return Point(step, tokens, train_s, *losses)


def summary_of(curve: list[Point], target: float) -> dict[str, Any]:
    """What a run spent until the target, in both ways of measuring, or None; its best and its last evaluation."""
    reached, estimated = (
        next((point._asdict() for point in curve if getattr(point, key) < target), None) for key in ("loss", "estimate")
    )
    best = min(curve, key=lambda point: point.loss)
    return {
        "to_target": reached,
        "to_target_on_random_windows": estimated,
        "best": best._asdict(),
        "last": curve[-1]._asdict(),
        "curve": [[point.step, round(point.train_s, 2), round(point.loss, 4)] for point in curve],
    }


def print_table(runs: dict[str, Any]) -> None:
    """Print the cost of the target for each run, and ours as a share of nanoGPT's."""
    columns = "{:12} {:>16} {:>10} {:>8} {:>18} {:>18}"
    print(columns.format("", "tokens to target", "seconds", "steps", "(random windows)", "lowest loss"))
    for name, run in runs.items():
        reached, estimated, best = run["to_target"], run["to_target_on_random_windows"], run["best"]
        spent = reached or run["last"]
        more = "" if reached else ">"
        cells = (f"{more}{spent['tokens']:,}", f"{more}{spent['train_s']:.1f}", f"{more}{spent['step']:,}",
                 f"{estimated['train_s']:.1f} s" if estimated else "not reached", f"{best['loss']:.4f}")  # fmt: skip
        print(columns.format(name, *cells))
    theirs, own = (run["to_target"] or run["last"] for run in runs.values())
    if runs["ours"]["to_target"]:
        bound = "" if runs["nanoGPT's"]["to_target"] else "at most "
        print(f"ours: {bound}{own['train_s'] / theirs['train_s']:.2f} of its seconds, "
              f"{bound}{own['tokens'] / theirs['tokens']:.2f} of its tokens")  # fmt: skip


if __name__ == "__main__":
    main()
