"""Batches of windows, (B, T), in an order that is a pure function of (seed, epoch, position).

Window i of a text x has the inputs x[i T : (i + 1) T] and the targets x[i T + 1 : (i + 1) T + 1]. The last window is
padded, and the targets of the padding are IGNORED. So an epoch has each token but the first exactly once as a target.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config.sections import WindowsConfig
from pipeline.data.token_files import TokenFolder, Tokens
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError

IGNORED = -100  # a target without a loss; the default ignore_index of cross_entropy


class Batch(NamedTuple):
    """The data of one forward pass; `n_targets` is on the CPU, so that reading it does not wait for the device."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED past the end of the text
    n_targets: int


def n_windows(n_tokens: int, length: int) -> int:
    """Number of fixed windows in a text, including the padded last one."""
    return -(-(n_tokens - 1) // length)


def steps_per_epoch(n_tokens: int, config: WindowsConfig) -> int:
    """Steps that together have as many windows as the text, rounded up."""
    return -(-n_windows(n_tokens, config.seq_len) // (config.micro_batch_size * config.gradient_accumulation_steps))


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

    @classmethod
    def read(
        cls, tokens: Path, tokenizer: Path, seq_len: int, vocab_size: int, fold_vocab: bool, device: torch.device
    ) -> "TrainingData":
        """Read and verify the files of the stage `tokenize`. Raises InputError if they do not fit the model."""
        text = TokenFolder(tokens)
        text.train.require(seq_len + 1)
        if (n_ids := max(text.train.vocab_size, text.val.vocab_size)) > vocab_size:
            raise InputError(
                f"{tokens} has {n_ids} ids, model.vocab_size is {vocab_size}: make model.vocab_size larger"
            )
        vocabulary = Vocabulary.of(text.train.counts(), vocab_size) if fold_vocab else Vocabulary.full(vocab_size)
        train = Split(text.train, vocabulary, device)
        validation = Split(text.val, vocabulary, device) if len(text.val) > 1 else None
        return cls(train, validation, vocabulary, load_tokenizer(tokenizer), text.sha256)


def steps_of(
    first_step: int, split: Split, config: WindowsConfig, seed: int, world: World = ALONE
) -> Iterator[list[Batch]]:
    """Yield the batches of step `first_step`, counted from 1, and of all later steps, without end.

    A step may contain the end of one epoch and the start of the next. Each process of `world` gets its share of each
    batch; `n_targets` still counts the targets of the whole batch.
    """
    windows_per_step = config.micro_batch_size * config.gradient_accumulation_steps
    position = (first_step - 1) * windows_per_step
    while True:
        starts = [_start(position + i, split.size, config, seed) for i in range(windows_per_step)]
        batches = [starts[i : i + config.micro_batch_size] for i in range(0, windows_per_step, config.micro_batch_size)]
        yield [
            make_batch(split, world.share(batch), config.seq_len)._replace(
                n_targets=_n_targets(split, batch, config.seq_len)
            )
            for batch in batches
        ]
        position += windows_per_step


def make_batch(split: Split, starts: list[int], length: int) -> Batch:
    """Read the windows that begin at `starts`; padding repeats the last token of the text."""
    ids = np.empty((len(starts), length + 1), np.int64)
    known = []
    for window, start in zip(ids, starts, strict=True):
        found = split.tokens.read(start, min(start + length + 1, split.size))
        window[: len(found)], window[len(found) :] = found, found[-1]
        known.append(len(found))
    windows = split.vocabulary.fold(torch.from_numpy(ids))  # (B, T + 1)
    inputs, targets = windows[:, :-1].clone(), windows[:, 1:].clone()  # (B, T) each
    for i, n in enumerate(known):
        targets[i, n - 1 :] = IGNORED
    if split.device.type == "cuda":  # the copy does not wait for the previous step
        inputs, targets = (part.pin_memory().to(split.device, non_blocking=True) for part in (inputs, targets))
    return Batch(inputs.to(split.device), targets.to(split.device), _n_targets(split, starts, length))


def _n_targets(split: Split, starts: list[int], length: int) -> int:
    return sum(min(length, split.size - 1 - start) for start in starts)


def _start(position: int, n_tokens: int, config: WindowsConfig, seed: int) -> int:
    """First token of the window at `position`, which is counted from 0 over all epochs."""
    epoch, index = divmod(position, n := n_windows(n_tokens, config.seq_len))
    if config.order == "random":
        return int(_rng(seed, epoch, index).integers(max(1, n_tokens - config.seq_len)))
    return config.seq_len * (int(_permutation(n, seed, epoch)[index]) if config.order == "shuffled" else index)


@lru_cache(maxsize=2)  # a step may contain parts of two epochs
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's windows, (n,)."""
    return _rng(seed, epoch).permutation(n)


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
