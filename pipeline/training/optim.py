"""Optimisers and learning-rate schedules, by name."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.sections import OptimConfig, steps_in

if TYPE_CHECKING:  # the check of params.yaml needs only the names
    import torch
    from torch import Tensor

    from pipeline.model.gpt import GPT
    from pipeline.training.optimizer import Optimizer

ADAMW_SLOTS = ("step", "exp_avg", "exp_avg_sq")


class Optimiser(NamedTuple):
    """An entry of OPTIMIZERS.

    `build` returns optimizers that together hold each parameter once, except the frozen ones. `slots` has an entry for
    each optimizer: the keys of its state for one parameter. `step` is a scalar; all others are fp32 tensors of the
    parameter's shape.
    """

    build: Callable[["GPT", OptimConfig, "torch.dtype"], list["Optimizer"]]
    slots: tuple[tuple[str, ...], ...]
    shards: bool = True  # whether it supports FSDP2


def _adamw(model: "GPT", config: OptimConfig, precision: "torch.dtype") -> list["Optimizer"]:
    """AdamW on all parameters."""
    return [_adamw_over(_trained(model), config)]


def _muon(model: "GPT", config: OptimConfig, precision: "torch.dtype") -> list["Optimizer"]:
    """Muon on the blocks' matrices, with matrix products in `precision`, and AdamW on all other parameters."""
    from pipeline.training.muon import Muon

    matrices = {n: p for n, p in model.h.named_parameters() if p.ndim == 2 and p.requires_grad}
    by_muon = {id(p) for p in matrices.values()}
    kinds = {n.split(".", 1)[1] for n in matrices}  # attn.c_attn.weight, ..., the same in every block
    alike = [
        {"params": [p for n, p in matrices.items() if n.endswith(kind)], "pieces": 3 if "c_attn" in kind else 1}
        for kind in sorted(kinds)
    ]
    return [
        _adamw_over([p for p in _trained(model) if id(p) not in by_muon], config),
        Muon(alike, config.muon_lr, config.momentum, config.weight_decay, precision),
    ]


OPTIMIZERS: dict[str, Optimiser] = {
    "muon": Optimiser(_muon, (ADAMW_SLOTS, ("momentum_buffer",)), shards=False),
    "adamw": Optimiser(_adamw, (ADAMW_SLOTS,)),
}


def _trained(model: "GPT") -> "list[Tensor]":
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def _adamw_over(parameters: "list[Tensor]", config: OptimConfig) -> "Optimizer":
    """AdamW with weight decay on matrices only."""
    from pipeline.training.optimizer import AdamW

    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, config.lr, config.betas, config.eps)


def build_optimizers(model: "GPT", config: OptimConfig, precision: "torch.dtype") -> list["Optimizer"]:
    """Build the optimisers of `optim.name`; each parameter group stores its `peak_lr`."""
    optimizers = OPTIMIZERS[config.name].build(model, config, precision)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def state_slots(optimizers: list["Optimizer"], config: OptimConfig) -> Iterator[tuple["Tensor", str, tuple[int, ...]]]:
    """For each parameter and each key of its optimiser state: the parameter, the key and the shape."""
    for optimizer, slots in zip(optimizers, OPTIMIZERS[config.name].slots, strict=True):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for slot in slots:
                yield parameter, slot, () if slot == "step" else tuple(parameter.shape)


def set_lr(optimizers: list["Optimizer"], factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Schedule(NamedTuple):
    """An entry of SCHEDULES. `fall` and `rise`: elapsed share of a phase -> completed share of the rate's change."""

    fall: Callable[[float], float]  # from the peak to `optim.min_lr_ratio`
    rise: Callable[[float], float] = lambda share: share  # from `optim.initial_lr` to the peak, in `optim.warmup`
    has_plateau: bool = False  # the fall takes the last `optim.decay` only


def _cosine(share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(fall=lambda share: 0.0),
    "linear": Schedule(fall=lambda share: share),
    "cosine": Schedule(fall=_cosine),
    "onecycle": Schedule(fall=_cosine, rise=_cosine),  # Smith 2018
    "wsd": Schedule(fall=lambda share: share, has_plateau=True),  # warm-up, stable, decay (Hu et al. 2024)
}


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """The learning rate at `step` of `total`, counted from 1, as a share of its peak."""
    schedule, warmup = SCHEDULES[config.schedule], steps_in(config.warmup, total)
    if step <= warmup:
        return config.initial_lr + (1 - config.initial_lr) * schedule.rise(step / warmup)
    fall_steps = steps_in(config.decay, total) if schedule.has_plateau else total - warmup
    behind = max(0.0, (step - 1 - (total - fall_steps)) / max(1, fall_steps))  # share of the fall, in [0, 1)
    return 1 - (1 - config.min_lr_ratio) * schedule.fall(behind)
