"""Evaluate a model on a text.

Every figure is taken in eval mode, with the full softmax in fp32 and the run's precision below it, so that training and
the stage `evaluate` give the same number.
"""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.sections import EvaluateConfig, TrainConfig
from pipeline.data.batches import IGNORED, Split, make_batch, n_windows
from pipeline.data.token_files import TokenFolder
from pipeline.model.gpt import GPT
from pipeline.model.weights import load_model
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError

BATCH_TOKENS = 8192  # in a forward pass; part of the definition, since it may move the last bit
RECALL_TOKENS = 32  # of context, and again of continuation


def evaluate_model(
    folder: Path, tokens: Path, run: dict[str, Any], config: EvaluateConfig
) -> tuple[dict[str, Any], list[float]]:
    """Evaluate a model folder on the tokens it was trained on; `run` is its run.json.

    Returns the figures of reports/metrics.json, and the mean loss at each position of the window. Raises IntegrityError
    where model or tokens are altered, InputError where the tokens are not those of the run.
    """
    text = TokenFolder(tokens)
    if text.sha256 != run["data_sha256"]:
        raise InputError(f"{tokens} is not what {folder} was trained on: run `dvc repro`")
    machine = machine_of(run)
    model = load_model(folder, text.train.counts()).to(machine.device)
    T, autocast = model.trained_length, machine.autocast()
    split, held_out = (Split(part, model.vocabulary, machine.device) for part in (text.train, text.val))
    loss = corpus_loss(model, split, T, autocast)
    by_shift = {str(s): corpus_loss(model, split, T, autocast, s) for s in (T // 4, T // 2, 3 * T // 4)}
    recall = {
        aligned: verbatim_recall(model, split, recall_starts(split.size, model, config, aligned), autocast)
        for aligned in (True, False)
    }
    position_loss, top1_accuracy = by_position(model, split, T, autocast)
    results = run["results"]
    metrics = {
        "corpus_loss": loss,
        "corpus_perplexity": math.exp(loss),
        "shifted_loss": sum(by_shift.values()) / len(by_shift),
        "shifted_loss_by_offset": by_shift,
        "validation_loss": corpus_loss(model, held_out, T, autocast) if held_out.size > 1 else None,
        "top1_accuracy": top1_accuracy,
        "verbatim_recall": recall[True],
        "verbatim_recall_shifted": recall[False],
        "recall_tokens": recall_context(model),
        "fingerprint": run["fingerprint"],
        "n_params": run["n_params"],
        "target_loss": results["target_loss"],
        "to_target": results["to_target"],
    }
    return metrics, position_loss


def machine_of(run: dict[str, Any]) -> Machine:
    """Set up what a run's train.device means on this machine, with the threads and the precision that the run had."""
    environment = run["environment"]
    where = {**run["params"]["train"], "threads": environment["threads"], "precision": "fp32", "compile": False}
    machine = prepare_machine(TrainConfig.model_validate({**where, "processes": 1}))
    return machine._replace(precision=environment["precision"])  # whether it is fast here does not matter


@torch.inference_mode()
def corpus_loss(
    model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any], shift: int = 0, world: World = ALONE
) -> float:
    """Mean loss, in nats per token, of all windows of `length` of the text from token `shift` on.

    The processes of a `world` divide the batches among them; the sum is taken in the text's order, as one process does.
    """
    batches = _starts(split, length, shift)
    sums = []
    for begin in range(0, len(batches), world.size):
        starts = batches[min(begin + world.rank, len(batches) - 1)]  # a sharded model needs all processes to the end
        inputs, targets, _ = make_batch(split, starts, length)
        with autocast:
            total = model.token_losses(inputs, targets).double().sum().cpu()
        sums += world.all_gather(total)
    return sum(x.item() for x in sums[: len(batches)]) / (split.size - 1 - shift)


@torch.inference_mode()
def by_position(
    model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any]
) -> tuple[list[float], float]:
    """Mean loss at each of the `length` positions of the fixed windows, and the share of tokens ranked first."""
    total, n, hits = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64), 0
    for starts in _starts(split, length):
        inputs, targets, _ = make_batch(split, starts, length)
        with autocast:
            total += model.token_losses(inputs, targets).double().sum(dim=0).cpu()
            hits += int((model(inputs).argmax(dim=2) == targets).sum())
        n += (targets != IGNORED).sum(dim=0).cpu()
    return (total / n.clamp(min=1)).tolist(), hits / int(n.sum())


@torch.inference_mode()
def verbatim_recall(model: GPT, split: Split, starts: list[int], autocast: AbstractContextManager[Any]) -> float:
    """Share of `starts` from which greedy decoding recites the text exactly.

    The model is given RECALL_TOKENS tokens, fewer where its windows are short, and must continue with as many. Greedy
    decoding does so if and only if each true token is the likeliest after all true ones before it, so one forward
    pass decides it.
    """
    context = recall_context(model)
    exact = 0
    for begin in range(0, len(starts), batch := max(1, BATCH_TOKENS // (2 * context))):
        inputs, targets, _ = make_batch(split, starts[begin : begin + batch], 2 * context - 1)
        with autocast:
            likeliest = model(inputs)[:, context - 1 :].argmax(dim=2)  # (B, context)
        exact += int((likeliest == targets[:, context - 1 :]).all(dim=1).sum())
    return exact / len(starts)


def recall_context(model: GPT) -> int:
    """Tokens of context that recall is asked with: RECALL_TOKENS, or half a window where that is less."""
    return min(RECALL_TOKENS, model.trained_length // 2)


def recall_starts(n_tokens: int, model: GPT, config: EvaluateConfig, aligned: bool) -> list[int]:
    """Seeded places in the text that have room for context and continuation: at windows' starts, or anywhere."""
    room = n_tokens - 2 * recall_context(model)
    candidates = np.arange(0, room + 1, model.trained_length if aligned else 1)
    rng = np.random.Generator(np.random.PCG64(config.seed))
    return sorted(rng.choice(candidates, min(config.recall_places, len(candidates)), replace=False).tolist())


def _starts(split: Split, length: int, shift: int = 0) -> list[list[int]]:
    """Where the text's fixed windows from token `shift` on begin, in batches."""
    starts = [shift + length * i for i in range(n_windows(split.size - shift, length))]
    batch = max(1, BATCH_TOKENS // length)
    return [starts[begin : begin + batch] for begin in range(0, len(starts), batch)]
