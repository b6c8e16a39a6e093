"""Forecast what a training costs on this machine: seconds of a step, memory and disk."""

import time
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.system.device import Machine, prepare_machine
from pipeline.training.config import RunConfig
from pipeline.training.preflight import n_checkpoints, saved_bytes, step_bytes
from pipeline.training.results import flops_per_token


class Forecast(NamedTuple):
    """The cost of a training on this machine."""

    step_s: float
    memory_bytes: int
    disk_bytes: int  # of the checkpoints and the model


def forecast(config: RunConfig, n_used: int) -> Forecast:
    """Forecast the cost of a training whose text has `n_used` different ids."""
    machine = prepare_machine(config.train)
    vocabulary = Vocabulary.of(np.arange(config.model.n_ids) < n_used, config.model.n_ids)
    checkpoint, model = saved_bytes(config, vocabulary)
    return Forecast(
        step_s=step_flops(config.model, vocabulary.n_rows, config.windows.seq_len, config.windows.step_tokens)
        / _flops_per_s(machine),
        memory_bytes=step_bytes(config, vocabulary, machine),
        disk_bytes=n_checkpoints(config.optim) * checkpoint + model,
    )


def step_flops(model: ModelConfig, n_rows: int, seq_len: int, step_tokens: int) -> float:
    """FLOPs of a step, with Muon's products of the blocks' matrices."""
    return flops_per_token(model, n_rows, seq_len) * step_tokens + 144 * model.n_layer * model.n_embd**3


@cache
def _flops_per_s(machine: Machine) -> float:
    """Speed of matrix products as in a small model, measured for a fifth of a second."""
    with machine.autocast():
        a, b = (torch.randn(1024, 512, device=machine.device), torch.randn(512, 2048, device=machine.device))
        a @ b
        n, started = 0, time.perf_counter()
        while time.perf_counter() - started < 0.2:
            float((a @ b)[0, 0])
            n += 1
    return 0.4 * n * 2 * 1024 * 512 * 2048 / (time.perf_counter() - started)
