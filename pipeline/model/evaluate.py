"""Evaluate a model on a text.

All metrics are measured in eval mode. Logits and softmax are in fp32, the layers below in the run's precision. So
training and the stage `evaluate` give the same numbers.
"""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config.sections import EvaluateConfig
from pipeline.data.batches import IGNORED, Split, make_batch, n_windows
from pipeline.data.token_files import TokenFolder
from pipeline.model.generator import AUTO
from pipeline.model.gpt import GPT
from pipeline.model.weights import load_model
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError

BATCH_TOKENS = 8192  # tokens in a forward pass; another number may change the last bit of a loss
RECALL_TOKENS = 32  # tokens of context, and as many of continuation


class WindowFigures(NamedTuple):
    """Metrics of the fixed windows that the model was trained on."""

    loss: float  # `corpus_loss`
    position_loss: list[float]  # mean loss at each position of the window
    top1_accuracy: float  # share of the tokens that the model ranks first


def evaluate_model(
    folder: Path, tokens: Path, run: dict[str, Any], config: EvaluateConfig
) -> tuple[dict[str, Any], list[float]]:
    """Evaluate a model folder on the tokens it was trained on; `run` is its run.json.

    Shows a progress bar on a terminal. Returns the content of reports/metrics.json, and the mean loss at each position
    of the window. Raises IntegrityError if model or tokens are altered, InputError if the tokens are not those of the
    run.
    """
    text = TokenFolder(tokens)
    if text.sha256 != run["data_sha256"]:
        raise InputError(f"{tokens} is not what {folder} was trained on: run `dvc repro`")
    machine = machine_of(run)
    model = load_model(folder, text.train.counts()).to(machine.device)
    T, autocast = model.trained_length, machine.autocast()
    split, held_out = (Split(part, model.vocabulary, machine.device) for part in (text.train, text.val))
    shifts = (T // 4, T // 2, 3 * T // 4)
    starts = {aligned: recall_starts(split.size, model, config, aligned) for aligned in (True, False)}
    n_inputs = T * sum(n_windows(n, T) for n in (held_out.size, *(split.size - shift for shift in (0, *shifts))))
    n_inputs += sum(len(places) * (2 * recall_context(model) - 1) for places in starts.values())
    with tqdm(total=n_inputs, desc="evaluate", unit="token", unit_scale=True, disable=None) as bar:  # on a terminal
        model.ln_f.register_forward_hook(lambda _layer, _inputs, hidden: bar.update(hidden.shape[:2].numel()))
        windows = window_figures(model, split, T, autocast)
        by_shift = {str(shift): corpus_loss(model, split, T, autocast, shift) for shift in shifts}
        recall = {aligned: verbatim_recall(model, split, places, autocast) for aligned, places in starts.items()}
        validation_loss = corpus_loss(model, held_out, T, autocast) if held_out.size > 1 else None
    results = run["results"]
    metrics = {
        "corpus_loss": windows.loss,
        "corpus_perplexity": math.exp(windows.loss),
        "shifted_loss": sum(by_shift.values()) / len(by_shift),
        "shifted_loss_by_offset": by_shift,
        "validation_loss": validation_loss,
        "top1_accuracy": windows.top1_accuracy,
        "verbatim_recall": recall[True],
        "verbatim_recall_shifted": recall[False],
        "recall_tokens": recall_context(model),
        "fingerprint": run["fingerprint"],
        "n_params": run["n_params"],
        "target_loss": results["target_loss"],
        "to_target": results["to_target"],
    }
    return metrics, windows.position_loss


def machine_of(run: dict[str, Any]) -> Machine:
    """Prepare the device that the run's train.device selects on this machine, with the run's threads and precision.

    MPS evaluates in fp32. In 16 bits, its attention reads future tokens in some versions of torch (their issue 195910).
    """
    environment, train = run["environment"], run["params"]["train"]
    where = {"device": train["device"], "deterministic": train["deterministic"], "threads": environment["threads"]}
    machine = prepare_machine(AUTO.updated(**where, precision="fp32"))
    if machine.device.type != "mps":
        return machine._replace(precision=environment["precision"])  # even if it is slow on this device
    if environment["precision"] != "fp32":
        print(f"evaluating in fp32: the run's precision {environment['precision']} is not reliable on MPS")
    return machine


@torch.inference_mode()
def corpus_loss(
    model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any], shift: int = 0, world: World = ALONE
) -> float:
    """Mean loss, in nats per token, of all windows of `length` tokens of the text from token `shift`.

    The processes of a `world` divide the batches among them. The losses are added in the order of the text, as in
    a single process.
    """
    batches = _starts(split, length, shift)
    sums = []
    for begin in range(0, len(batches), world.size):
        # A sharded model runs on all processes together: those without a batch at the end repeat the last one.
        starts = batches[min(begin + world.rank, len(batches) - 1)]
        inputs, targets, _ = make_batch(split, starts, length)
        with autocast:
            total = model.token_losses(inputs, targets).cpu().double().sum()  # MPS has no float64
        sums += world.all_gather(total)
    return sum(x.item() for x in sums[: len(batches)]) / (split.size - 1 - shift)


@torch.inference_mode()
def window_figures(model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any]) -> WindowFigures:
    """Measure the fixed windows of `length` tokens once; the loss has the same bits as `corpus_loss`."""
    sums, position_sums = [], torch.zeros(length, dtype=torch.float64)
    hits, n = 0, torch.zeros(length, dtype=torch.int64)  # of targets at each position
    for starts in _starts(split, length):
        inputs, targets, _ = make_batch(split, starts, length)
        with autocast:
            hidden = model.hidden(inputs)  # (B, T, C)
            losses = model.losses_of(hidden, targets).cpu().double()  # (B, T)
            hits += int((model.head(hidden).argmax(dim=2) == targets).sum())
        sums.append(losses.sum().item())
        position_sums += losses.sum(dim=0)
        n += (targets != IGNORED).sum(dim=0).cpu()
    return WindowFigures(sum(sums) / (split.size - 1), (position_sums / n.clamp(min=1)).tolist(), hits / int(n.sum()))


@torch.inference_mode()
def verbatim_recall(model: GPT, split: Split, starts: list[int], autocast: AbstractContextManager[Any]) -> float:
    """Share of `starts` from which greedy decoding recites the text exactly.

    The context is RECALL_TOKENS tokens, or half a window if that is less, and the continuation is as long. Greedy
    decoding recites it if and only if each of its tokens has the highest probability, given all tokens before it. So
    one forward pass is enough.
    """
    context = recall_context(model)
    exact = 0
    for begin in range(0, len(starts), batch := max(1, BATCH_TOKENS // (2 * context))):
        inputs, targets, _ = make_batch(split, starts[begin : begin + batch], 2 * context - 1)
        with autocast:
            likeliest = model.head(model.hidden(inputs)[:, context - 1 :]).argmax(dim=2)  # (B, context)
        exact += int((likeliest == targets[:, context - 1 :]).all(dim=1).sum())
    return exact / len(starts)


def recall_context(model: GPT) -> int:
    """Tokens of context for verbatim recall: RECALL_TOKENS, or half a window if that is less."""
    return min(RECALL_TOKENS, model.trained_length // 2)


def recall_starts(n_tokens: int, model: GPT, config: EvaluateConfig, aligned: bool) -> list[int]:
    """Sample positions of the text with room for context and continuation: starts of windows, or any positions."""
    room = n_tokens - 2 * recall_context(model)
    candidates = np.arange(0, room + 1, model.trained_length if aligned else 1)
    rng = np.random.Generator(np.random.PCG64(config.seed))
    return sorted(rng.choice(candidates, min(config.recall_places, len(candidates)), replace=False).tolist())


def _starts(split: Split, length: int, shift: int = 0) -> list[list[int]]:
    """Start positions of the fixed windows of the text from token `shift`, in batches."""
    starts = [shift + length * i for i in range(n_windows(split.size - shift, length))]
    batch = max(1, BATCH_TOKENS // length)
    return [starts[begin : begin + batch] for begin in range(0, len(starts), batch)]
