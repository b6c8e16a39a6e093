"""Compare the forecast of a run with its outcome: seconds and memory, for a few short runs on this machine.

    python -m benchmarks.forecasts [CASE ...] [--threads N]

Run `make repro` first: the runs read the first tokens of data/tokens. Forecast and run have a process each, one after
the other, so that both see the same load. Seconds are those of all steps and evaluations. No run reaches its target, so
all use up the budget. Each line has the ratio outcome / forecast. At the end are the medians of the relative errors.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.params import load_params
from pipeline.data.batches import TrainingData
from pipeline.data.token_files import Tokens
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.signals import StopSignals
from pipeline.training.config import RunConfig
from pipeline.training.forecast import Forecast, forecast
from pipeline.training.run import open_run
from pipeline.training.train import follow, read_config, read_data

TEXT_TOKENS = 8_000


class Case(NamedTuple):
    """A run: a model, the windows of a step, and the number of steps."""

    n_layer: int
    n_head: int
    n_embd: int
    seq_len: int
    step_windows: int
    steps: int
    optimizer: str = "muon"
    rule: str = "sliding"

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}, {self.step_windows} x {self.seq_len}, {self.optimizer}"


CASES = {
    "small": Case(2, 2, 128, 64, 4, 120),
    "narrow": Case(2, 4, 256, 64, 8, 40),
    "wide": Case(2, 8, 512, 64, 16, 16),
    "deep": Case(6, 6, 384, 128, 16, 8),
    "adamw": Case(4, 4, 256, 128, 8, 20, "adamw", "corpus"),
}


class Outcome(NamedTuple):
    """What a run has cost."""

    seconds: float
    memory_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecasts", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all if none is given")
    parser.add_argument("--threads", type=int, help="of both; default: train.threads")
    arguments = parser.parse_args()
    print(
        "model, windows of a step, optimiser | steps | seconds | forecast | ratio | MB | forecast | ratio", flush=True
    )
    ratios = []
    for case in map(CASES.__getitem__, arguments.cases or CASES):
        cost = _in_process(_forecast, case, arguments.threads)
        outcome = _in_process(_train, case, arguments.threads)
        forecast_s = cost.train_s + cost.evaluation_s
        ratios.append((outcome.seconds / forecast_s, outcome.memory_bytes / cost.memory_bytes))
        print(
            f"{case} | {case.steps} | {outcome.seconds:.1f} | {forecast_s:.1f} | {ratios[-1][0]:.2f} "
            f"| {outcome.memory_bytes / 1e6:.0f} | {cost.memory_bytes / 1e6:.0f} | {ratios[-1][1]:.2f}",
            flush=True,
        )
    for name, found in zip(("time", "memory"), zip(*ratios, strict=True), strict=True):
        print(f"median relative error of {name}: {statistics.median(abs(ratio - 1) for ratio in found):.0%}")


def _in_process(function: Callable[[Case, int | None], Any], case: Case, threads: int | None) -> Any:
    """Call the function in a fresh process, whose memory no other run has used."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, case, threads).result()


def _prepare(case: Case, threads: int | None) -> tuple[RunConfig, Machine, TrainingData]:
    whole = read_config(load_params(), Path("data"))
    config = replace(
        whole,
        model=whole.model.updated(
            n_layer=case.n_layer, n_head=case.n_head, n_embd=case.n_embd, block_size=case.seq_len, fold_vocab=True
        ),
        windows=whole.windows.updated(
            seq_len=case.seq_len, micro_batch_size=case.step_windows, gradient_accumulation_steps=1
        ),
        optim=whole.optim.updated(name=case.optimizer),
        train=whole.train.updated(**({} if threads is None else {"threads": threads})),
        target=whole.target.updated(
            loss=1e-6, rule=case.rule, eval_interval=max(1, case.steps // 2), early_stopping_patience=None
        ),
    )
    machine = prepare_machine(config.train)
    text = read_data(config, machine, Path("data"))
    text = replace(text, train=text.train._replace(tokens=_beginning(text.train.tokens)))
    epochs = (case.steps - 0.5) * config.windows.step_tokens / text.train.size
    return replace(config, optim=config.optim.updated(max_epochs=epochs)), machine, text


def _beginning(tokens: Tokens) -> Tokens:
    """The first TEXT_TOKENS tokens, so that evaluations do not take longer than the steps."""
    return Tokens(tokens.name, [tokens.read(0, min(TEXT_TOKENS, len(tokens)))], tokens.vocab_size)


def _forecast(case: Case, threads: int | None) -> Forecast:
    config, machine, text = _prepare(case, threads)
    held_out = text.validation.size if text.validation else 0
    return forecast(config, machine, text.vocabulary, text.train.size, held_out)


def _train(case: Case, threads: int | None) -> Outcome:
    config, machine, text = _prepare(case, threads)
    home = tempfile.TemporaryDirectory(prefix="forecasts-")
    with home as folder, StopSignals() as stop, open_run(config, machine, text, Path(folder)) as run:
        follow(run, stop)
        assert len(run.records) == case.steps, "the whole budget is used"
        return Outcome(run.records[-1].wall_s, max(record.memory_bytes for record in run.records))


if __name__ == "__main__":
    main()
