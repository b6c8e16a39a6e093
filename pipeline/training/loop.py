"""The training loop: a generator that takes optimiser steps and yields a record after each.

It does not depend on files, MLflow or Optuna. The caller evaluates, logs, samples, saves, prunes and stops between two
records; the time that this takes is not part of `step_s`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.sections import ModelConfig, OptimConfig, TrainConfig
from pipeline.data.batches import Batch
from pipeline.data.vocab import Vocabulary
from pipeline.model.fsdp import assign, full_tensor, is_shard, last_row, like, local, shard
from pipeline.model.gpt import GPT
from pipeline.model.published import load_published
from pipeline.system.device import Machine
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import DivergedError
from pipeline.tracking.journal import StepRecord
from pipeline.training.optim import build_optimizers, lr_factor, set_lr
from pipeline.training.optimizer import Optimizer


class Loss(nn.Module):
    """The loss as the forward method of a module, as DistributedDataParallel requires."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, n_targets: int) -> Tensor:
        return self.model.loss(inputs, targets, n_targets)


@dataclass
class TrainState:
    """Everything that a step changes. A run that is saved and restored computes the same bits as an uninterrupted one.

    Every process of `world` has the full state, or its shards if the model is sharded.
    """

    SCALARS: ClassVar = ("step", "tokens", "loss_scale", "good_steps")

    model: GPT
    optimizers: list[Optimizer]
    loss_scale: float  # keeps fp16 gradients above zero; 1 in other precisions
    loss: nn.Module
    world: World = ALONE
    sharded: bool = False
    scaled: bool = False  # whether the scale may grow: in fp16
    good_steps: int = 0  # since the scale last changed
    step: int = 0
    tokens: int = 0
    names: dict[int, str] = field(init=False)  # id of a parameter -> its name

    def __post_init__(self) -> None:
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state's tensors by file: weights, optimiser state, RNG state of each process.

        A collective operation: all processes must call it. Sharded tensors are unsharded on the CPU of rank 0 only.
        """
        slots = {
            f"{self.names[id(parameter)]}/{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }
        groups = {"weights": dict(self.model.state_dict()), "optimizer": slots}
        whole = {
            stem: {key: full_tensor(value, keep=self.world.is_main) for key, value in group.items()}
            for stem, group in groups.items()
        }
        return {**whole, "rng": self._random_states()}

    def scalars(self) -> dict[str, Any]:
        """The state's scalars."""
        return {name: getattr(self, name) for name in self.SCALARS}

    def restore(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any]) -> None:
        """Load the results of `tensors()` and `scalars()` in place; the number of processes may have changed."""
        weights = self.model.state_dict()
        assert weights.keys() == tensors["weights"].keys(), "the tensors are of another model"
        for name, weight in weights.items():
            assign(weight, tensors["weights"][name])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = f"{self.names[id(parameter)]}/"
                    optimizer.state[parameter] = {
                        key.removeprefix(prefix): like(parameter, value)
                        for key, value in tensors["optimizer"].items()
                        if key.startswith(prefix)
                    }
        for device, random in self._random().items():
            if (state := tensors["rng"].get(f"{device}-{self.world.rank}")) is not None:
                random.set_rng_state(state)
        for name in self.SCALARS:
            setattr(self, name, scalars[name])

    def whole_model(self) -> GPT | None:
        """The model, or a full copy on the CPU of rank 0 if it is sharded. A collective operation."""
        if not self.sharded:
            return self.model
        weights = {name: full_tensor(x, keep=self.world.is_main) for name, x in self.model.state_dict().items()}
        if not self.world.is_main:
            return None
        with torch.device("meta"):  # random weights would take numbers from the RNG of dropout
            model = GPT(self.model.config, self.model.vocabulary)
        model.to_empty(device="cpu").load_state_dict(weights)
        model.trained_length = self.model.trained_length
        return model

    def _random_states(self) -> dict[str, Tensor]:
        """The RNG state of each process. Dropout depends on it."""
        states = {device: random.get_rng_state() for device, random in self._random().items()}
        return {
            f"{key}-{rank}": x for key, state in states.items() for rank, x in enumerate(self.world.all_gather(state))
        }

    def _random(self) -> dict[str, Any]:
        """The modules of torch with the RNG of the CPU and of the model's device."""
        device = self.model.wte.weight.device.type
        return {"cpu": torch.random} | ({} if device == "cpu" else {device: torch.get_device_module(device)})

    def scale_after(self, finite: bool) -> None:
        """Halve the fp16 loss scale after an overflow; double it after 2000 steps without one."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
        elif self.good_steps == 2000 and self.scaled:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0


def fresh_state(
    shape: ModelConfig,
    vocabulary: Vocabulary,
    optim: OptimConfig,
    train: TrainConfig,
    machine: Machine,
    init: Path | None = None,
) -> TrainState:
    """A model before its first step, and its optimisers. The weights are equal in all processes.

    They are those in the folder `init`, or depend on the seed only. The RNG of dropout is seeded differently in each
    process.
    """
    world = machine.world
    torch.manual_seed(train.seed + world.rank)
    sharded = train.shard and world.size > 1
    with torch.device("meta" if sharded else machine.device):  # the full model may not fit on one device
        model = GPT(shape, vocabulary, train.gradient_checkpointing, machine.compiled)
    if sharded:
        shard(model, model.h, machine.device.type, world.size, methods=("loss", "token_losses"))
        model.to_empty(device=machine.device)
    if init is None:
        model.initialise(train.seed)
    else:
        load_published(model, init)
    model.freeze(train.freeze)
    loss: nn.Module = Loss(model)
    if world.size > 1 and not sharded:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    precision = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    optimizers = build_optimizers(model, optim, precision)
    scaled = machine.precision == "fp16"
    return TrainState(model, optimizers, 2.0**16 if scaled else 1.0, loss, world, sharded, scaled)


def train_steps(
    state: TrainState, steps: Iterator[list[Batch]], max_steps: int, optim: OptimConfig, machine: Machine
) -> Iterator[StepRecord]:
    """Take optimiser steps until `max_steps`, yielding a record after each; `state` is mutated.

    The caller may log, evaluate, sample, save `state` or stop between records. `steps` begins with the batches of step
    `state.step + 1`. Each process gets its share of the batches; all yield equal records. Raises DivergedError before
    the update if the loss or the gradient is not finite.
    """
    first_step = state.step + 1
    for step in range(first_step, max_steps + 1):
        started = time.perf_counter()
        state.model.train()  # the caller may have evaluated since the last step
        set_lr(state.optimizers, factor := lr_factor(step, max_steps, optim))
        batches = next(steps)
        if step == first_step and isinstance(state.loss, DistributedDataParallel):
            _settle(state, batches, machine)
        loss, grad_norm = _gradients(state, batches, optim.max_grad_norm, machine)
        while not math.isfinite(grad_norm) and math.isfinite(loss) and state.loss_scale > 1:
            state.scale_after(finite=False)  # an fp16 overflow: repeat the step
            loss, grad_norm = _gradients(state, batches, optim.max_grad_norm, machine)
        _check_finite(step, loss, grad_norm, lr := optim.lr * factor)
        for optimizer in state.optimizers:
            optimizer.step()
        state.scale_after(finite=True)
        state.step, state.tokens = step, state.tokens + sum(batch.n_targets for batch in batches)
        yield StepRecord(step, state.tokens, loss, grad_norm, lr, step_s=time.perf_counter() - started)


def _gradients(state: TrainState, batches: list[Batch], clip: float | None, machine: Machine) -> tuple[float, float]:
    """Compute the gradients of the mean loss over all batches, clip them, and return the loss and the gradient norm."""
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    n_targets = sum(batch.n_targets for batch in batches)
    loss = torch.zeros((), device=machine.device)
    for batch in batches:
        with _exchange(state, batch is batches[-1]):
            with machine.autocast():
                part = state.loss(batch.inputs, batch.targets, n_targets)
            (part * (state.loss_scale * state.world.size)).backward()  # DDP and FSDP average over the processes
        loss += part.detach()
    grad_norm = finish_gradients(state.model, clip, state.loss_scale, state.world)
    state.world.add(loss)
    loss_now, norm_now = torch.stack([loss, grad_norm]).tolist()  # the only synchronisation with the GPU in a step
    return loss_now, norm_now


@torch.no_grad()
def finish_gradients(model: GPT, clip: float | None, loss_scale: float = 1.0, world: World = ALONE) -> Tensor:
    """Unscale and clip the gradients; return their norm before clipping, a 0-D tensor.

    The folded row's gradient is the sum over all unused ids, and is divided by their number. The norm is the L2 norm
    over all parameters of the unfolded model, so the folded row counts once for each unused id. With sharded gradients
    every process of `world` gets the norm over all shards.
    """
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if loss_scale != 1:
        torch._foreach_div_(gradients, loss_scale)
    table = model.wte.weight.grad
    unused = last_row(table) if (U := model.vocabulary.n_unused) else None  # type: ignore[arg-type]
    if unused is not None:
        unused /= U
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    if unused is not None:
        squares += (U - 1) * unused.square().sum()
    if is_shard(model.wte.weight):
        world.add(squares)
    norm = squares.sqrt()
    if clip is not None:
        factor = (clip / (norm + 1e-6)).clamp(max=1)  # like torch's clip_grad_norm_
        if norm.device.type != "cpu" or factor < 1:  # on a GPU the comparison would wait for it
            torch._foreach_mul_(gradients, factor)
    return norm


def _exchange(state: TrainState, last: bool) -> AbstractContextManager[None]:
    """Average the gradients over the processes only in the last backward pass of a step.

    FSDP does it in each one: otherwise every process would hold the gradients of the whole model in between.
    """
    if isinstance(state.loss, DistributedDataParallel) and not last:
        return state.loss.no_sync()
    return nullcontext()


def _settle(state: TrainState, batches: list[Batch], machine: Machine) -> None:
    """Compute the step's gradients once and discard them.

    DistributedDataParallel rebuilds its buckets after the first backward pass, which changes the order of its sums.
    Without this the first step after a resume would differ in the last bits from an uninterrupted run.
    """
    devices = [machine.device] if machine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        _gradients(state, batches[-1:], None, machine)


def _check_finite(step: int, loss: float, grad_norm: float, lr: float) -> None:
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"{name} is {value} at step {step}, lr {lr:.3g}: the weights before this step are kept; "
                "try a smaller optim.lr or a longer optim.warmup"
            )
