"""AdamW, and what it has in common with the other optimisers of this project.

The classes of torch.optim import torch's compiler when they are made, which takes two seconds.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class Optimizer(ABC):
    """Parameter groups, and the state of each parameter by key, as torch.optim.Optimizer has them."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        """`groups`: each with its `params`, and settings that replace those of `defaults`."""
        self.param_groups = [{**defaults, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        """Remove the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @abstractmethod
    def step(self) -> None:
        """Update the parameters from their gradients."""


class AdamW(Optimizer):
    """torch.optim.AdamW with its fused kernel: the same bits and the same state (Loshchilov and Hutter 2019)."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        if not (state := self.state[p]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state
