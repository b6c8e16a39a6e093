"""optim: gradients -> updates. Parameter groups, AdamW and Muon, clipping, and the learning rate of each step."""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from pipeline.config import Section
from pipeline.model import GPT
from pipeline.windows import WindowsConfig


class OptimConfig(Section):
    """The optimiser and its schedule; `warmup` and `decay` are steps where they are integers, else shares."""

    section_name: ClassVar[str] = "optim"

    kind: Literal["muon", "adamw"]
    lr: float = Field(gt=0)
    muon_lr: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    betas: tuple[float, float]
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip: float | None = Field(gt=0)
    max_tokens: int = Field(ge=1)
    schedule: Literal["constant", "linear", "cosine", "onecycle", "wsd"]
    warmup: int | float = Field(ge=0)
    decay: int | float = Field(ge=0)
    initial_lr: float = Field(ge=0, le=1)
    final_lr: float = Field(ge=0, le=1)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each beta should be at least 0 and below 1")
        return betas

    @field_validator("warmup", "decay")
    @classmethod
    def _steps_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("should be a whole number of steps or a share below 1")
        return value

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        shares = [value for value in (self.warmup, self._decay) if isinstance(value, float)]
        if sum(shares) > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together are longer than the run")
        return self

    @property
    def _decay(self) -> int | float:
        return self.decay if self.schedule == "wsd" else 0

    def max_steps(self, windows: WindowsConfig) -> int:
        """Steps that it takes to see `max_tokens`, rounded up."""
        return math.ceil(self.max_tokens / windows.step_tokens)

    def check_length(self, windows: WindowsConfig) -> list[str]:
        """Name the contradiction, if there is one, between the run's length and its phases."""
        total = self.max_steps(windows)
        phases = steps_in(self.warmup, total) + steps_in(self._decay, total)
        if phases <= total:
            return []
        return [f"optim: warmup {self.warmup} and decay {self._decay} take {phases} steps, the run has {total}"]


def steps_in(length: int | float, total: int) -> int:
    """Steps behind a length that is given in steps or as a share of `total`."""
    return length if isinstance(length, int) else round(length * total)


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Factor on the peak learning rate at `step`, counted from 1, of `total`.

    onecycle: both flanks are cosines (Smith 2018); wsd: warm-up, stable, linear decay (Hu et al. 2024).
    """
    warmup = steps_in(config.warmup, total)
    if step <= warmup:
        rise = step / warmup
        if config.schedule == "onecycle":
            rise = (1 - math.cos(math.pi * rise)) / 2
        return config.initial_lr + (1 - config.initial_lr) * rise
    fall_steps = steps_in(config.decay, total) if config.schedule == "wsd" else total - warmup
    behind = max(0.0, (step - 1 - (total - fall_steps)) / max(1, fall_steps))  # share of the fall, in [0, 1)
    match config.schedule:
        case "constant":
            fall = 0.0
        case "linear" | "wsd":
            fall = behind
        case "cosine" | "onecycle":
            fall = (1 - math.cos(math.pi * behind)) / 2
    return 1 - (1 - config.final_lr) * fall


def build_optimizers(model: GPT, config: OptimConfig) -> list[Optimizer]:
    """AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest; decay on matrices alone.

    Each group carries its `peak_lr`. Muon: Jordan et al. 2024.
    """
    matrices = [p for p in model.h.parameters() if p.ndim == 2] if config.kind == "muon" else []
    by_muon = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=_fused(rest))]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def finish_gradients(model: GPT, clip: float | None, loss_scale: float = 1.0) -> Tensor:
    """Undo the loss scale, turn the folded row's gradient into one unused id's, clip; return the norm of all, 0-D.

    The norm is L2 over all parameters of the full model, before clipping: the folded row counts once for each id.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if loss_scale != 1:
        torch._foreach_div_(gradients, loss_scale)
    unused = model.wte.weight.grad[-1] if (U := model.vocabulary.n_unused) else None  # type: ignore[index]
    if unused is not None:
        unused /= U
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    if unused is not None:
        squares += (U - 1) * unused.square().sum()
    norm = squares.sqrt()
    if clip is not None:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
    return norm


def _fused(parameters: list[torch.nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
