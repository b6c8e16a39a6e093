"""What is done to the gradients between the backward pass and the optimisers' steps."""

import torch
from torch import Tensor

from pipeline.model.fsdp import is_shard, last_row, local
from pipeline.model.gpt import GPT
from pipeline.system.distributed import ALONE, World


@torch.no_grad()
def finish_gradients(model: GPT, clip: float | None, loss_scale: float = 1.0, world: World = ALONE) -> Tensor:
    """Undo the loss scale, turn the folded row's gradient into one unused id's, clip; return the norm of all, 0-D.

    The norm is L2 over all parameters of the full model, before clipping: the folded row counts once for each id. Of
    sharded gradients each process of `world` holds a part, and all get the norm of the whole.
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
    if is_shard(table):  # type: ignore[arg-type]
        world.add(squares)
    norm = squares.sqrt()
    if clip is not None:
        factor = (clip / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
        if norm.device.type != "cpu" or factor < 1:  # a GPU would have to be waited for
            torch._foreach_mul_(gradients, factor)
    return norm
