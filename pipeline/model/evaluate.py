"""Evaluate a model on a text.

All metrics are measured in eval mode, with the layers in the run's precision. The logits and the softmax of a loss are
in fp32. Accuracy and recall rank the logits in the run's precision, as greedy decoding does. So training and the stage
`evaluate` give the same numbers.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from pipeline.config.sections import EvaluateConfig
from pipeline.data.batches import IGNORED, Split, Windows, fixed_windows, make_batch, n_windows, sliding_windows
from pipeline.data.statistics import bits_per_byte, bytes_per_token
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.generator import AUTO
from pipeline.model.gpt import GPT
from pipeline.model.weights import load_model
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError
from pipeline.system.progress import Bar

BATCH_TOKENS = 8192  # tokens in a forward pass; another number may change the last bit of a loss
MIN_BATCHES = 16  # in a text, so that the first batch is a small part of it
LOSSES: dict[str, tuple[str, Callable[[int, int], Windows]]] = {  # loss -> part of the tokens, and its windows
    "validation_loss": ("val", fixed_windows),
    "corpus_loss": ("train", fixed_windows),
    "sliding_loss": ("train", sliding_windows),
}
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

    Shows its progress. Returns the content of reports/metrics.json, and the mean loss at each position
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
    places = {kind: recall_places(split.size, model, config, kind) for kind in ("aligned", "shifted", "anywhere")}
    n_inputs = T * sum(n_windows(n, T) for n in (held_out.size, *(split.size - shift for shift in (0, *shifts))))
    n_inputs += T * len(sliding_windows(split.size, T))
    n_inputs += sum(len(each) * (int(each[:, 1].max()) + recall_tokens(model)) for each in places.values())
    with Bar(total=n_inputs, desc="evaluate", unit="tokens", unit_scale=True) as bar:

        def count(_layer: Module, _inputs: object, hidden: Tensor) -> None:  # what a hook returns replaces the output
            bar.update(hidden.shape[:2].numel())

        model.ln_f.register_forward_hook(count)
        windows = window_figures(model, split, T, autocast)
        sliding = sliding_loss(model, split, T, autocast)
        by_shift = {str(shift): corpus_loss(model, split, T, autocast, shift) for shift in shifts}
        recall = {kind: verbatim_recall(model, split, each, autocast) for kind, each in places.items()}
        validation_loss = corpus_loss(model, held_out, T, autocast) if held_out.size > 1 else None
    results, tokenizer = run["results"], load_tokenizer(folder)
    of_train, of_val = (bytes_per_token(part, tokenizer) for part in (text.train, text.val))
    metrics = {
        "sliding_loss": sliding,
        "sliding_bits_per_byte": bits_per_byte(sliding, of_train),
        "corpus_loss": windows.loss,
        "corpus_bits_per_byte": bits_per_byte(windows.loss, of_train),
        "corpus_perplexity": math.exp(windows.loss) if windows.loss < 700 else None,  # a double ends at e^709
        "shifted_loss": sum(by_shift.values()) / len(by_shift),
        "shifted_loss_by_offset": by_shift,
        "validation_loss": validation_loss,
        "validation_bits_per_byte": bits_per_byte(validation_loss, of_val),
        "top1_accuracy": windows.top1_accuracy,
        "verbatim_recall": recall["aligned"],
        "verbatim_recall_shifted": recall["shifted"],
        "verbatim_recall_anywhere": recall["anywhere"],
        "recall_tokens": recall_tokens(model),
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


class TextLoss(NamedTuple):
    """The loss of a text, in nats per token."""

    loss: float
    complete: bool  # False: an estimate from a part of the text


@torch.inference_mode()
def text_loss(
    model: GPT,
    split: Split,
    windows: Windows,
    length: int,
    autocast: AbstractContextManager[Any],
    world: World = ALONE,
    target: float | None = None,
) -> TextLoss:
    """Mean loss over the targets of `windows` of `length` tokens.

    Each batch has windows from all parts of the text, so that its loss is an estimate. With a `target` the evaluation
    ends as soon as the mean of the batches so far is above it by three standard errors, or is more than twice as high.
    The processes of a `world` divide the batches among them; the losses are added in the same order as in a single
    process.
    """
    batches = _batches(windows, length)
    total, n_targets, means = 0.0, 0, list[float]()
    for begin in range(0, len(batches), world.size):
        # A sharded model runs on all processes together: those without a batch at the end repeat the last one.
        batch = batches[min(begin + world.rank, len(batches) - 1)]
        inputs, targets, n = make_batch(split, batch, length)
        with autocast:
            losses = model.token_losses(inputs, targets, int(batch[:, 1].min()))
        found = torch.stack([losses.cpu().double().sum(), torch.tensor(n, dtype=torch.float64)])  # MPS has no float64
        for loss, count in (each.tolist() for each in world.all_gather(found)[: len(batches) - begin]):
            total, n_targets = total + loss, n_targets + int(count)
            means.append(loss / count)
        if target is not None and len(means) < len(batches) and _is_clearly_above(means, target):
            return TextLoss(total / n_targets, complete=False)
    return TextLoss(total / n_targets, complete=True)


def _is_clearly_above(estimates: list[float], target: float) -> bool:
    """Whether the mean of `estimates` is above `target` by three of its standard errors, or more than twice as high."""
    mean, n = float(np.mean(estimates)), len(estimates)
    return mean > 2 * target or (n > 3 and mean - 3 * float(np.std(estimates, ddof=1)) / math.sqrt(n) > target)


def corpus_loss(model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any], shift: int = 0) -> float:
    """Mean loss, in nats per token, over the fixed windows of the text from token `shift`."""
    return text_loss(model, split, fixed_windows(split.size, length, shift), length, autocast).loss


def sliding_loss(model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any]) -> float:
    """Mean loss, in nats per token, over the sliding windows of the text: each token has at least T/2 before it."""
    return text_loss(model, split, sliding_windows(split.size, length), length, autocast).loss


@torch.inference_mode()
def window_figures(model: GPT, split: Split, length: int, autocast: AbstractContextManager[Any]) -> WindowFigures:
    """Measure the fixed windows of `length` tokens once; the loss has the same bits as `corpus_loss`."""
    total, position_sums = 0.0, torch.zeros(length, dtype=torch.float64)
    hits, n = 0, torch.zeros(length, dtype=torch.int64)  # of targets at each position
    for batch in _batches(fixed_windows(split.size, length), length):
        inputs, targets, _ = make_batch(split, batch, length)
        with autocast:
            hidden = model.hidden(inputs)  # (B, T, C)
            losses = model.losses_of(hidden, targets).cpu().double()  # (B, T)
            hits += int((model.head(hidden).argmax(dim=2) == targets).sum())
        total += losses.sum().item()
        position_sums += losses.sum(dim=0)
        n += (targets != IGNORED).sum(dim=0).cpu()
    return WindowFigures(total / (split.size - 1), (position_sums / n.clamp(min=1)).tolist(), hits / int(n.sum()))


@torch.inference_mode()
def verbatim_recall(model: GPT, split: Split, places: Windows, autocast: AbstractContextManager[Any]) -> float:
    """Share of `places` at which greedy decoding recites the text exactly.

    A place is a window and the position of its first target, from which on `recall_tokens(model)` tokens are recited.
    Greedy decoding recites them if and only if each has the highest probability, given all tokens before it. So one
    forward pass is enough. An end of text among them is predicted like any other token, although generation would
    stop there.
    """
    exact, n, length = 0, recall_tokens(model), int(places[:, 1].max()) + recall_tokens(model)
    for batch in _batches(places, length):
        inputs, targets, _ = make_batch(split, batch, length)
        for row, first in zip(targets, batch[:, 1].tolist(), strict=True):
            row[first + n :] = IGNORED
        with autocast:
            likeliest = model(inputs).argmax(dim=2)  # (B, length)
        exact += int(((likeliest == targets) | (targets == IGNORED)).all(dim=1).sum())
    return exact / len(places)


def recall_tokens(model: GPT) -> int:
    """Length of a recital, and the shortest context before it: RECALL_TOKENS, or half a window if that is less."""
    return min(RECALL_TOKENS, model.trained_length // 2)


def recall_places(n_tokens: int, model: GPT, config: EvaluateConfig, kind: str) -> Windows:
    """Sample places of the text for `verbatim_recall`.

    `kind`: "aligned": after the first tokens of a fixed window; "shifted": at any token, with the same context;
    "anywhere": at any token, with a context of any length that leaves room for the recital in a window.
    """
    T, n = model.trained_length, recall_tokens(model)
    candidates = np.arange(n, n_tokens - n + 1, T if kind == "aligned" else 1)
    rng = np.random.Generator(np.random.PCG64(config.seed))
    places = np.sort(rng.choice(candidates, min(config.recall_places, len(candidates)), replace=False))
    contexts = np.minimum(places, rng.integers(n, T - n + 1, len(places)) if kind == "anywhere" else n)
    return np.stack([places - contexts, contexts - 1], axis=1)


def _batches(windows: Windows, length: int) -> list[Windows]:
    """Divide `windows` into batches of BATCH_TOKENS; each has windows from all parts of the text."""
    n = min(len(windows), max(MIN_BATCHES, -(-len(windows) * length // BATCH_TOKENS)))
    return [windows[i::n] for i in range(n)]
