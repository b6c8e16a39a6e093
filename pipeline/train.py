"""train: windows in, StepRecords out. The loop knows nothing of files, MLflow or Optuna; its consumers do.

Logging, evaluation, samples, checkpoints, pruning and stopping at the target happen between two records, in whoever
iterates; only training is on the loop's clock.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.errors import DivergedError
from pipeline.machine import Machine, TrainConfig
from pipeline.model import GPT, ModelConfig
from pipeline.optim import OptimConfig, build_optimizers, finish_gradients, lr_factor, set_lr
from pipeline.vocab import Vocabulary
from pipeline.windows import Batch


class StepRecord(NamedTuple):
    """What one optimiser step did; every field is logged under its own name."""

    step: int  # counts from 1
    tokens: int  # seen so far, this step included
    loss: float  # nats per token on this step's windows, before the update
    grad_norm: float  # L2 over all parameters, before clipping
    lr: float  # of AdamW
    step_s: float  # of this step; a GPU may still be at its update, which the next step then waits for


@dataclass
class TrainState:
    """All that a step changes: saved whole, restored whole, it goes on with the same bits."""

    FACTS: ClassVar = ("step", "tokens", "loss_scale", "good_steps")

    model: GPT
    optimizers: list[Optimizer]
    loss_scale: float  # keeps fp16 gradients above zero; 1 in other precisions
    good_steps: int = 0  # since the scale last changed
    step: int = 0
    tokens: int = 0
    names: dict[int, str] = field(init=False)  # id of a parameter -> its name

    def __post_init__(self) -> None:
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state's tensors by file: weights, optimiser, random numbers."""
        slots = {
            f"{self.names[id(parameter)]}/{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }
        rng = {"cpu": torch.get_rng_state()}
        if self.model.wte.weight.is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state()
        return {"weights": dict(self.model.state_dict()), "optimizer": slots, "rng": rng}

    def facts(self) -> dict[str, Any]:
        """The state's numbers."""
        return {name: getattr(self, name) for name in self.FACTS}

    def restore(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Take over what `tensors()` and `facts()` gave, in place."""
        self.model.load_state_dict(tensors["weights"])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = f"{self.names[id(parameter)]}/"
                    optimizer.state[parameter] = {
                        key.removeprefix(prefix): value.to(parameter.device)
                        for key, value in tensors["optimizer"].items()
                        if key.startswith(prefix)
                    }
        torch.set_rng_state(tensors["rng"]["cpu"])
        if "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"])
        for name in self.FACTS:
            setattr(self, name, facts[name])

    def scale_after(self, finite: bool) -> None:
        """Halve the fp16 loss scale after an overflow, double it after many steps without one."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
        elif self.good_steps == 2000 and self.loss_scale > 1:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0


def fresh_state(
    shape: ModelConfig, vocabulary: Vocabulary, optim: OptimConfig, train: TrainConfig, machine: Machine
) -> TrainState:
    """An untrained model and its optimisers, drawn from the seed."""
    torch.manual_seed(train.seed)
    model = GPT(shape, vocabulary, train.gradient_checkpointing, machine.compiled)
    model = model.initialise(train.seed).to(machine.device)
    precision = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    return TrainState(model, build_optimizers(model, optim, precision), 2.0**16 if machine.precision == "fp16" else 1.0)


def train_steps(
    state: TrainState, steps: Iterator[list[Batch]], max_steps: int, optim: OptimConfig, machine: Machine
) -> Iterator[StepRecord]:
    """Take optimiser steps until `max_steps`, yielding a record after each; `state` is mutated.

    The caller may log, evaluate, sample, save `state` or stop between records. `steps` begins with the batches of step
    `state.step + 1`. Raises DivergedError before the update when loss or gradient is not finite.
    """
    for step in range(state.step + 1, max_steps + 1):
        started = time.perf_counter()
        state.model.train()  # the caller may have evaluated since the last step
        set_lr(state.optimizers, factor := lr_factor(step, max_steps, optim))
        batches = next(steps)
        loss, grad_norm = _gradients(state, batches, optim.clip, machine)
        while not math.isfinite(grad_norm) and math.isfinite(loss) and state.loss_scale > 1:
            state.scale_after(finite=False)  # an fp16 overflow: the same step again
            loss, grad_norm = _gradients(state, batches, optim.clip, machine)
        _check_finite(step, loss, grad_norm, lr := optim.lr * factor)
        for optimizer in state.optimizers:
            optimizer.step()
        state.scale_after(finite=True)
        state.step, state.tokens = step, state.tokens + sum(batch.n_targets for batch in batches)
        yield StepRecord(step, state.tokens, loss, grad_norm, lr, time.perf_counter() - started)


def _gradients(state: TrainState, batches: list[Batch], clip: float | None, machine: Machine) -> tuple[float, float]:
    """Leave the clipped gradients of the mean loss over all batches in the model; return that loss and their norm."""
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    n_targets = sum(batch.n_targets for batch in batches)
    loss = torch.zeros((), device=machine.device)
    for batch in batches:
        with machine.autocast():
            part = state.model.loss(batch.inputs, batch.targets, n_targets)
        (part * state.loss_scale).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    grad_norm = finish_gradients(state.model, clip, state.loss_scale)
    loss_now, norm_now = torch.stack([loss, grad_norm]).tolist()  # the one time in a step that a GPU is waited for
    return loss_now, norm_now


def _check_finite(step: int, loss: float, grad_norm: float, lr: float) -> None:
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"{name} is {value} at step {step}, lr {lr:.3g}: the weights before it are kept; "
                "try a smaller optim.lr or a longer optim.warmup"
            )
