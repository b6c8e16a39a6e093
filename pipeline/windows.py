"""windows: ids -> (B, T) inputs and targets, in an order that is a pure function of (seed, epoch, position).

A window is T inputs with their T targets, each target the token after its input. Fixed windows cut the text every T
tokens; the last one is padded, and its surplus targets are IGNORED, so that one pass sees every token of the text but
the first exactly once as a target.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Section

IGNORED = -100  # a target that counts nowhere; cross_entropy's own default


class WindowsConfig(Section):
    """What one optimiser step sees: `accumulate` batches of `batch` windows of `length` tokens."""

    section_name: ClassVar[str] = "windows"

    length: int = Field(ge=2)
    batch: int = Field(ge=1)
    accumulate: int = Field(ge=1)
    order: Literal["shuffled", "sequential", "random"]

    @property
    def step_tokens(self) -> int:
        """Targets in a step of whole windows."""
        return self.length * self.batch * self.accumulate


class Batch(NamedTuple):
    """One forward pass; `n_targets` is known without asking the device."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED past the end of the text
    n_targets: int


def n_windows(n_tokens: int, length: int) -> int:
    """Fixed windows in a text, the padded last one included."""
    return -(-(n_tokens - 1) // length)


def steps_per_pass(n_tokens: int, config: WindowsConfig) -> int:
    """Steps that see as many windows as the text has, rounded up."""
    return -(-n_windows(n_tokens, config.length) // (config.batch * config.accumulate))


def steps_of(first_step: int, ids: Tensor, config: WindowsConfig, seed: int) -> Iterator[list[Batch]]:
    """Yield the batches of step `first_step` (counted from 1), of the next, and so on for ever.

    `ids`: the text, 1-D, on the device to train on. The windows run on from pass to pass: a step may hold the end of
    one and the start of the next.
    """
    windows_per_step = config.batch * config.accumulate
    position = (first_step - 1) * windows_per_step
    while True:
        starts = [_start(position + i, len(ids), config, seed) for i in range(windows_per_step)]
        yield [gather(ids, starts[i : i + config.batch], config.length) for i in range(0, len(starts), config.batch)]
        position += windows_per_step


def gather(ids: Tensor, starts: list[int], length: int) -> Batch:
    """Cut the windows that begin at `starts` out of `ids`."""
    overhang = max(0, max(starts) + length + 1 - len(ids))
    start = torch.tensor(starts)[:, None]  # (B, 1)
    if ids.is_cuda:
        start = start.pin_memory().to(ids.device, non_blocking=True)  # without waiting for the step before
    positions = start + torch.arange(length + 1, device=ids.device)  # (B, T + 1)
    windows = ids[positions.clamp(max=len(ids) - 1)].long()  # (B, T + 1)
    inputs, targets = windows[:, :-1], windows[:, 1:]  # (B, T) each
    if overhang:
        targets = targets.masked_fill(positions[:, 1:] >= len(ids), IGNORED)
    n_targets = sum(min(length, len(ids) - 1 - begin) for begin in starts)
    return Batch(inputs.contiguous(), targets.contiguous(), n_targets)


def _start(position: int, n_tokens: int, config: WindowsConfig, seed: int) -> int:
    """Where the window at `position`, counted from 0 over all passes, begins."""
    epoch, index = divmod(position, n := n_windows(n_tokens, config.length))
    if config.order == "random":
        return int(_rng(seed, epoch, index).integers(max(1, n_tokens - config.length)))
    return config.length * (int(_permutation(seed, epoch, n)[index]) if config.order == "shuffled" else index)


@lru_cache(maxsize=2)  # a step may straddle two passes
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return _rng(seed, epoch).permutation(n)


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
