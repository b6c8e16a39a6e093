"""Cut ids into (B, T) inputs and targets, in an order that is a pure function of (seed, epoch, position).

A window is T inputs with their T targets, each target the token after its input. Fixed windows cut the text every T
tokens; the last one is padded, and its surplus targets are IGNORED, so that an epoch has every token of the text but
the first exactly once as a target.
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

IGNORED = -100  # a target that counts nowhere; cross_entropy's own default


class Batch(NamedTuple):
    """One forward pass; `n_targets` is known without asking the device."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED past the end of the text
    n_targets: int


def n_windows(n_tokens: int, length: int) -> int:
    """Fixed windows in a text, the padded last one included."""
    return -(-(n_tokens - 1) // length)


def steps_per_epoch(n_tokens: int, config: WindowsConfig) -> int:
    """Steps that see as many windows as the text has, rounded up."""
    return -(-n_windows(n_tokens, config.seq_len) // (config.micro_batch_size * config.gradient_accumulation_steps))


class Split(NamedTuple):
    """A part of the text as the model reads it: compact ids, cut out of the token files window by window."""

    tokens: Tokens
    vocabulary: Vocabulary
    device: torch.device

    @property
    def size(self) -> int:
        """Tokens in the part."""
        return len(self.tokens)


@dataclass(frozen=True)
class TrainingData:
    """What a run learns, as the model's compact ids."""

    train: Split
    validation: Split | None  # None where nothing is held out
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    sha256: str  # of the token files

    @classmethod
    def read(
        cls, tokens: Path, tokenizer: Path, seq_len: int, vocab_size: int, fold_vocab: bool, device: torch.device
    ) -> "TrainingData":
        """Read and verify what the stage `tokenize` wrote. Raises InputError where it does not suit the model."""
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
    """Yield the batches of step `first_step` (counted from 1), of the next, and so on for ever.

    A step may hold the end of one epoch and the start of the next. The processes of a `world` get their share of each
    batch, which still counts the targets of all of it.
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
    """Cut the windows that begin at `starts` out of the text; what is past its end repeats its last token."""
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
    if split.device.type == "cuda":  # without waiting for the step before
        inputs, targets = (part.pin_memory().to(split.device, non_blocking=True) for part in (inputs, targets))
    return Batch(inputs.to(split.device), targets.to(split.device), _n_targets(split, starts, length))


def _n_targets(split: Split, starts: list[int], length: int) -> int:
    return sum(min(length, split.size - 1 - start) for start in starts)


def _start(position: int, n_tokens: int, config: WindowsConfig, seed: int) -> int:
    """Where the window at `position`, counted from 0 over all epochs, begins."""
    epoch, index = divmod(position, n := n_windows(n_tokens, config.seq_len))
    if config.order == "random":
        return int(_rng(seed, epoch, index).integers(max(1, n_tokens - config.seq_len)))
    return config.seq_len * (int(_permutation(n, seed, epoch)[index]) if config.order == "shuffled" else index)


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's windows, (n,)."""
    return _rng(seed, epoch).permutation(n)


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
