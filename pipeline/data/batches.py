"""Batches of windows, (B, T), in an order that is a pure function of (seed, epoch, position).

A window at token s of a text x has the inputs x[s : s + T] and the targets x[s + 1 : s + T + 1]. Past the end of the
text it is padded, and the targets of the padding are IGNORED. So are the targets before the window's `first`: there the
window only reads context.

Fixed windows start at 0, T, 2T and so on: an epoch has each token but the first exactly once as a target. Jittered
windows start at other tokens in each epoch, 3T/4 to T apart: an epoch has each token but the first once or twice as a
target, and in the course of training at every position of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.sections import WindowsConfig
from pipeline.data.token_files import TokenFolder, Tokens
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError

IGNORED = -100  # a target without a loss; the default ignore_index of cross_entropy

Windows = npt.NDArray[np.int64]  # (n, 2): the first token of each window, and the position of its first target


class Batch(NamedTuple):
    """The data of one forward pass; `n_targets` is on the CPU, so that reading it does not wait for the device."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED where the loss does not count
    n_targets: int


def n_windows(n_tokens: int, length: int) -> int:
    """Number of fixed windows in a text, including the padded last one."""
    return -(-(n_tokens - 1) // length)


def fixed_windows(n_tokens: int, length: int, shift: int = 0) -> Windows:
    """The fixed windows of the text from token `shift`."""
    return _all_counted(np.arange(shift, n_tokens - 1, length))


def sliding_windows(n_tokens: int, length: int) -> Windows:
    """Windows of `length` T that are 3T/8 to T/2 apart, at random, from the beginning of the text to its end.

    A window counts the targets that no window before it has. Each of them has at least T/2 inputs, unless it is in the
    first window. The windows depend on `n_tokens` and `length` alone.
    """
    last, low, high = max(0, n_tokens - 1 - length), max(1, 3 * length // 8), max(1, length // 2)
    strides = _rng(n_tokens, length).integers(low, high + 1, size=last // low + 1)
    starts = np.unique(np.append(0, np.minimum(np.cumsum(strides), last)))
    return np.stack([starts, np.maximum(0, np.append(0, starts[:-1] + length - starts[1:]))], axis=1)


def _jittered_windows(n_tokens: int, length: int, rng: np.random.Generator) -> Windows:
    """One window at the beginning of the text, one at its end, and in between a grid with strides of at most 7T/8.

    The grid is shifted as a whole, and each of its windows by up to T/8.
    """
    last, n = max(0, n_tokens - 1 - length), windows_per_epoch(n_tokens, length, "jittered") - 2
    if n < 1:
        return _all_counted(np.unique([0, last]))
    grid = (np.arange(n) + rng.random()) * last / n + rng.random(n) * length / 8
    return _all_counted(np.concatenate([[0], grid.astype(np.int64).clip(1, last - 1), [last]]))


def _all_counted(starts: npt.NDArray[np.int64]) -> Windows:
    """The windows at `starts`, which count all of their targets."""
    return np.stack([starts, np.zeros_like(starts)], axis=1)


def windows_per_epoch(n_tokens: int, length: int, order: str) -> int:
    """Number of windows in an epoch; jittered windows overlap, so there are more of them than fixed ones."""
    if order != "jittered":
        return n_windows(n_tokens, length)
    last = max(0, n_tokens - 1 - length)
    return min(2, last + 1) if last < 2 else 2 - (-8 * last // (7 * length))


def steps_per_epoch(n_tokens: int, config: WindowsConfig) -> int:
    """Steps that together have as many windows as an epoch, rounded up."""
    return -(-windows_per_epoch(n_tokens, config.seq_len, config.order) // config.step_windows)


class Split(NamedTuple):
    """A split of the text, from whose token files windows of compact ids are read."""

    tokens: Tokens
    vocabulary: Vocabulary
    device: torch.device

    @property
    def size(self) -> int:
        """Number of tokens in the split."""
        return len(self.tokens)


@dataclass(frozen=True)
class TrainingData:
    """The data of a run: its splits, with vocabulary and tokenizer."""

    train: Split
    validation: Split | None  # None if nothing is held out
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    sha256: str  # of the token files
    init: Path | None = None  # folder of the weights that training starts from; None: random weights

    @classmethod
    def read(
        cls, tokens: Path, tokenizer: Path, seq_len: int, vocab_size: int, fold_vocab: bool, device: torch.device
    ) -> "TrainingData":
        """Read and verify the files of the stage `tokenize`. Raises InputError if they do not fit the rest."""
        text, loaded = TokenFolder(tokens), load_tokenizer(tokenizer)
        text.require_tokenizer(loaded)
        text.train.require(seq_len + 1)
        if (n_ids := max(text.train.vocab_size, text.val.vocab_size)) > vocab_size:
            raise InputError(f"{tokens} has {n_ids} ids, the model {vocab_size}: run `dvc repro -f tokenize`")
        vocabulary = Vocabulary.of(text.train.counts(), vocab_size) if fold_vocab else Vocabulary.full(vocab_size)
        train = Split(text.train, vocabulary, device)
        validation = Split(text.val, vocabulary, device) if len(text.val) > 1 else None
        return cls(train, validation, vocabulary, loaded, text.sha256)


def steps_of(
    first_step: int, split: Split, config: WindowsConfig, seed: int, world: World = ALONE
) -> Iterator[list[Batch]]:
    """Yield the batches of step `first_step`, counted from 1, and of all later steps, without end.

    A step may contain the end of one epoch and the start of the next. Each process of `world` gets its share of each
    batch; `n_targets` still counts the targets of the whole batch.
    """
    position, size = (first_step - 1) * config.step_windows, config.micro_batch_size
    while True:
        step = np.stack([_window(position + i, split.size, config, seed) for i in range(config.step_windows)])
        batches = [step[i : i + size] for i in range(0, len(step), size)]
        shares = [make_batch(split, world.share(batch), config.seq_len) for batch in batches]
        numbers = [_n_targets(split, batch, config.seq_len) for batch in batches]
        yield [share._replace(n_targets=n) for share, n in zip(shares, numbers, strict=True)]
        position += config.step_windows


def make_batch(split: Split, windows: Windows, length: int) -> Batch:
    """Read `windows` of `length` tokens; padding repeats the last token of the text."""
    ids = np.empty((len(windows), length + 1), np.int64)
    known = []
    for row, start in zip(ids, windows[:, 0].tolist(), strict=True):
        found = split.tokens.read(start, min(start + length + 1, split.size))
        row[: len(found)], row[len(found) :] = found, found[-1]
        known.append(len(found))
    rows = split.vocabulary.fold(torch.from_numpy(ids))  # (B, T + 1)
    inputs, targets = rows[:, :-1].clone(), rows[:, 1:].clone()  # (B, T) each
    for row, n, first in zip(targets, known, windows[:, 1].tolist(), strict=True):
        row[:first] = row[n - 1 :] = IGNORED
    if split.device.type == "cuda":  # the copy does not wait for the previous step
        inputs, targets = (part.pin_memory().to(split.device, non_blocking=True) for part in (inputs, targets))
    return Batch(inputs.to(split.device), targets.to(split.device), _n_targets(split, windows, length))


def _n_targets(split: Split, windows: Windows, length: int) -> int:
    return int((np.minimum(length, split.size - 1 - windows[:, 0]) - windows[:, 1]).sum())


def _window(position: int, n_tokens: int, config: WindowsConfig, seed: int) -> Windows:
    """The window at `position`, which is counted from 0 over all epochs, (2,)."""
    epoch, index = divmod(position, windows_per_epoch(n_tokens, config.seq_len, config.order))
    if config.order == "random":
        return np.array([_rng(seed, epoch, index).integers(max(1, n_tokens - config.seq_len)), 0])
    window: Windows = _epoch(n_tokens, config, seed, epoch)[index]
    return window


@lru_cache(maxsize=2)  # a step may contain parts of two epochs
def _epoch(n_tokens: int, config: WindowsConfig, seed: int, epoch: int) -> Windows:
    """The windows of an epoch, in the order in which they are read."""
    rng = _rng(seed, epoch)
    if config.order == "jittered":
        windows = _jittered_windows(n_tokens, config.seq_len, rng)
    else:
        windows = fixed_windows(n_tokens, config.seq_len)
    return windows if config.order == "sequential" else windows[rng.permutation(len(windows))]


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
