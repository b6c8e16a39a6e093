"""Forecast what a run costs on this machine: seconds, from steps that are timed now, memory and disk.

The steps are those of a throw-away model. They are timed under the present load of the machine, so the seconds hold for
this load. `totarget learn` passes the forecast on to the stage `train`, whose run in MLflow gets it as tags.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np
import torch

from pipeline.config.sections import TargetConfig
from pipeline.data.batches import Batch, Split, fixed_windows, make_batch, steps_of, steps_per_epoch
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model.evaluate import BATCH_TOKENS, LOSSES, MIN_BATCHES
from pipeline.model.gpt import GPT
from pipeline.system.device import Machine, give_back_memory
from pipeline.system.distributed import ALONE
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.preflight import check_fits, n_checkpoints, saved_bytes, step_bytes
from pipeline.training.results import flops_per_token
from pipeline.training.target import RULES

VARIABLE = "TOTARGET_FORECAST"  # of the environment: the forecast of the run that the stage `train` trains
WARM_UP = 2  # steps that are not timed
MIN_STEPS = 2  # timed steps, at least
MIN_S = 3.0  # seconds of timed steps, at least; for evaluations, a third of it
MAX_S = 15.0  # seconds of all steps, at most: the last step begins earlier
TIMED_FLOPS = {"cpu": 1e12}  # of a timed step, at most: seconds on two cores
TEXT_TOKENS = 1 << 20  # of the throw-away text, and of the text whose windows are counted, at most
PROCESS_BYTES = 410_000_000  # of a process that trains on a CPU, without tensors: Python, torch and its kernels
MODEL_COPIES = 3  # in models/, DVC's cache and MLflow's store
SHIFTED = 3  # losses of shifted windows, which the stage `evaluate` measures besides those of training
EVALUATIONS = 2  # whole evaluations that cost as much as all of a run, most of which end early, without eval_interval


class Forecast(NamedTuple):
    """The cost of a run that uses up its budget, on this machine under its present load."""

    step_s: float
    train_s: float  # seconds of all steps
    evaluation_s: float  # seconds of the evaluations between the steps and after the last one
    evaluate_s: float  # seconds of the stage `evaluate`, without its start
    memory_bytes: int  # peak of the process on a CPU, of the tensors on a GPU
    disk_bytes: int  # checkpoints and model, with the copies of DVC and MLflow; at most

    def environment(self) -> dict[str, str]:
        """The environment variable with which the stage `train` tags its run."""
        return {VARIABLE: json.dumps(self._asdict())}

    @classmethod
    def of_environment(cls) -> Self | None:
        """The forecast that `environment` has passed on, or None; what is not a forecast is ignored with a message."""
        if VARIABLE not in os.environ:
            return None
        try:
            passed_on = cls(**json.loads(os.environ[VARIABLE]))
            passed_on.tags()  # raises TypeError if a value is not a number
        except (ValueError, TypeError):
            print(f"the environment variable {VARIABLE} is not a forecast: the run gets no tags of it")
            return None
        return passed_on

    def tags(self) -> dict[str, str]:
        """The tags of a run, such as forecast_train_s; its metrics train_s, wall_s and memory_bytes are the outcome."""
        return {f"forecast_{name}": str(round(value, 4)) for name, value in self._asdict().items()}


def vocabulary_of(n_ids: int, n_used: int, folds: bool) -> Vocabulary:
    """The vocabulary of a text that is known only by the number of its different ids; `folds`: model.fold_vocab."""
    return Vocabulary.of(np.arange(n_ids) < n_used, n_ids) if folds else Vocabulary.full(n_ids)


def forecast(
    config: RunConfig,
    machine: Machine,
    vocabulary: Vocabulary,
    n_tokens: int,
    n_held_out: int = 0,
    min_s: float = MIN_S,
) -> Forecast:
    """Forecast the run on a training text of `n_tokens` tokens, with `n_held_out` tokens for validation.

    A step that would take long is timed with fewer layers or windows, in proportion to its FLOPs. Of several processes,
    those of the machine's world, one is timed with its share of the batch, without their communication. A compiled
    model is forecast as one that is not, which is slower. Takes 5 to 40 seconds, and less with a lower `min_s`, the
    least seconds of timed steps. Raises OutOfSpaceError if the timed step does not fit into memory. A model that is
    sharded cannot be timed: no process holds all of it.
    """
    n = machine.world.size
    share = _with_batch(config, config.windows.micro_batch_size // n)
    timed = _timed_part(share, vocabulary.n_rows, TIMED_FLOPS.get(machine.device.type, math.inf))
    check_fits(_with_batch(timed, timed.windows.micro_batch_size * n), vocabulary, machine)
    try:
        alone = machine._replace(compiled=False, world=ALONE)
        step_s, token_s = _time(timed, alone, vocabulary, n_tokens, min_s)
    finally:
        give_back_memory()  # the training begins while this process waits for it
    step_s *= step_flops(share, vocabulary.n_rows) / step_flops(timed, vocabulary.n_rows)
    token_s *= token_flops(config, vocabulary.n_rows) / token_flops(timed, vocabulary.n_rows)
    n_steps = config.optim.max_steps(config.windows, n_tokens)
    reads = _read_tokens(config.windows.seq_len, n_tokens, n_held_out)
    n_evaluated = _evaluated_tokens(config.target, n_steps, steps_per_epoch(n_tokens, config.windows), reads)
    checkpoint, model = saved_bytes(config, vocabulary, n)
    return Forecast(
        step_s=step_s,
        train_s=n_steps * step_s,
        evaluation_s=n_evaluated * token_s / n,
        evaluate_s=(SHIFTED * n_tokens + sum(reads.values())) * token_s,
        memory_bytes=step_bytes(config, vocabulary, machine, math.ceil(max(reads.values()) / MIN_BATCHES))
        + PROCESS_BYTES * (machine.device.type == "cpu"),
        disk_bytes=n_checkpoints(config.optim) * checkpoint + MODEL_COPIES * model,
    )


def _with_batch(config: RunConfig, windows: int) -> RunConfig:
    return replace(config, windows=config.windows.updated(micro_batch_size=windows))


def step_flops(config: RunConfig, n_rows: int) -> int:
    """FLOPs of a step without the optimiser; `n_rows`: rows of the embedding."""
    return config.windows.step_tokens * token_flops(config, n_rows)


def token_flops(config: RunConfig, n_rows: int) -> int:
    """FLOPs of a token in training, forward and backward."""
    return flops_per_token(config.model, n_rows, config.windows.seq_len)


def _timed_part(config: RunConfig, n_rows: int, limit: float) -> RunConfig:
    """The configuration with so few layers, batches and windows in a step that this has at most `limit` FLOPs."""
    while step_flops(config, n_rows) > limit:
        model, windows = config.model, config.windows
        if model.n_layer > 2:
            freeze = config.train.updated(freeze=min(config.train.freeze // 2, model.n_layer // 2 - 1))
            config = replace(config, model=model.updated(n_layer=model.n_layer // 2), train=freeze)
        elif (n := windows.gradient_accumulation_steps) > 1:
            config = replace(config, windows=windows.updated(gradient_accumulation_steps=n // 2))
        elif (n := windows.micro_batch_size) > 1:
            config = replace(config, windows=windows.updated(micro_batch_size=n // 2))
        else:
            break
    return config


def _time(
    config: RunConfig, machine: Machine, vocabulary: Vocabulary, n_tokens: int, min_s: float
) -> tuple[float, float]:
    """Mean seconds of a training step, and of a token in an evaluation, of an untrained model on random ids."""
    windows, length = config.windows, config.windows.seq_len
    ids = np.random.default_rng(0).choice(vocabulary.used.numpy(), min(n_tokens, TEXT_TOKENS))
    text = Split(Tokens("text", [ids.astype(np.uint16)], vocabulary.size), vocabulary, machine.device)
    optim = config.optim.updated(schedule="constant", warmup=10**6)  # a rate near zero: the loss stays finite
    state = fresh_state(config.model, vocabulary, optim, config.train, machine)
    batches = steps_of(1, text, windows, config.train.seed)
    step_s = _mean_s((record.step_s for record in train_steps(state, batches, 10**6, optim, machine)), min_s)
    batch = make_batch(text, fixed_windows(text.size, length)[: max(1, BATCH_TOKENS // length)], length)
    return step_s, _mean_s(_evaluations_s(state.model, batch, machine), min_s / 3) / batch.inputs.numel()


def _evaluations_s(model: GPT, batch: Batch, machine: Machine) -> Iterator[float]:
    """Evaluate the batch without end; yield the seconds of each time."""
    model.eval()
    while True:
        started = time.perf_counter()
        with torch.inference_mode(), machine.autocast():
            model.token_losses(batch.inputs, batch.targets, 0).sum().item()
        yield time.perf_counter() - started


def _mean_s(seconds: Iterator[float], min_s: float) -> float:
    """Mean of the `seconds` after the warm-up: of at least MIN_STEPS, and until their sum is at least `min_s`.

    After MAX_S in all, warm-up included, it is the mean of what there is.
    """
    found: list[float] = []
    for each in seconds:
        found.append(each)
        timed = found[WARM_UP:]
        if (len(timed) >= MIN_STEPS and sum(timed) >= min_s) or sum(found) >= MAX_S:
            break
    timed = found[WARM_UP:] or found[-1:]
    return sum(timed) / len(timed)


def _read_tokens(length: int, n_tokens: int, n_held_out: int) -> dict[str, int]:
    """Tokens that an evaluation of each loss reads, in windows of `length` tokens; 0 without a held-out text.

    Of a long text, the windows of its first TEXT_TOKENS tokens are counted: all of them would take gigabytes.
    """
    sizes, reads = {"train": n_tokens, "val": n_held_out}, dict[str, int]()
    for name, (part, windows) in LOSSES.items():
        begin = min(sizes[part], TEXT_TOKENS)
        reads[name] = len(windows(begin, length)) * length * sizes[part] // max(1, begin)
    return reads


def _evaluated_tokens(target: TargetConfig, n_steps: int, steps_per_epoch: int, reads: dict[str, int]) -> int:
    """Tokens that the evaluations of a run read: those of its rule, of the held-out text, and all after the end."""
    rule, n_held_out = RULES[target.rule], reads["validation_loss"]
    of_rule = 0 if rule.needs_held_out else reads[rule.loss]
    if target.eval_interval is None:
        between = EVALUATIONS * of_rule + n_steps // steps_per_epoch * n_held_out
    else:
        between = n_steps // target.eval_interval * (of_rule + n_held_out)
    return between + sum(reads.values())
