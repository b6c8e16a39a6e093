"""Shard a model and its state over the processes of a world with FSDP2, and unshard them."""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# A sharded tensor is a DTensor: its rows are divided equally, in the order of ranks; the last parts may be shorter.


def shard(model: nn.Module, blocks: nn.ModuleList, device: str, processes: int, methods: tuple[str, ...]) -> None:
    """Shard the parameters of `model` over `processes`; its gradients become their mean over these.

    `device`: its type; torch would choose the machine's GPU, also for a training on the CPU.
    A block's parameters are unsharded while the block runs, all others while one of `methods` runs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_shard(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether `x` is a DTensor; the class is not imported, since that takes most of a second in every command."""
    return hasattr(x, "full_tensor")


@torch.no_grad()
def assign(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, which every process has, into `target`; if `target` is sharded, only this process's part."""
    target.copy_(like(target, whole))


def like(target: Tensor, whole: Tensor) -> Tensor:
    """`whole` on the device of `target`, and sharded in the same way."""
    whole = whole.to(target.device)
    if not is_shard(target) or whole.shape != target.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def full_tensor(x: Tensor, keep: bool) -> Tensor:
    """Unshard a tensor to the CPU, or return an empty one without `keep`. A plain tensor is returned unchanged."""
    if not is_shard(x):
        return x
    whole = x.full_tensor()
    return whole.cpu() if keep else whole.new_empty(0)


def local(x: Tensor) -> Tensor:
    """This process's part of `x`; all of `x` if it is not sharded."""
    return x.to_local() if is_shard(x) else x


def last_row(x: Tensor) -> Tensor | None:
    """The last row of a matrix; None in a process whose shard lacks it."""
    if not is_shard(x):
        return x[-1]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    (rows, *_), (first, *_) = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local()[-1] if rows and first + rows == x.shape[0] else None
