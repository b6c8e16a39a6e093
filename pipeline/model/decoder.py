"""decoder: a GPT -> the same GPT laid out for writing: keys and values kept, weights packed, the head where asked.

B: sequences, T: new positions of each, n: positions kept, C: n_embd, H: n_head, D: C / H, V: rows of the embedding. The
residual stream, the norms and the logits are fp32; matrix products, keys and values are in the precision, as under
autocast in training.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.gpt import GPT, Block, attend

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Linear = Callable[[Tensor], Tensor]  # (..., C_in) -> (..., C_out)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer and its q, k, v, (B, H, T, D) each -> (B, H, T, D)

FIRST_UNWRITTEN = 50257  # the ids after <|endoftext|> are padding
GROWTH = 64  # positions; oneDNN compiles a kernel for each new shape, and reads what lies in one piece faster


class Cache:
    """Keys and values of a batch of sequences: `keys[layer]` and `values[layer]`, (B, H, n, D) each.

    The memory is allocated once, for `limit` positions; what is in use of it lies in one piece, and n grows.
    """

    def __init__(self, n_layer: int, shape: tuple[int, int, int], limit: int, like: Tensor) -> None:
        """`shape`: B, H and D; `like`: a tensor of the dtype and on the device that all of it is to have."""
        B, H, D = shape
        self._memory, self.limit = like.new_empty((2, n_layer, B * H * limit * D)), limit
        self._lay_out(B, H, 0, D)

    def reserve(self, n: int) -> None:
        """Make room for `n` positions."""
        B, _, room, _ = self.keys[0].shape
        if n > room:
            self._keep(list(range(B)), min(-(-n // GROWTH) * GROWTH, self.limit))

    def select(self, sequences: list[int]) -> None:
        """Keep these sequences alone, in this order."""
        self._keep(sequences, self.keys[0].shape[2])

    def _keep(self, sequences: list[int], n: int) -> None:
        """Lay these sequences out with room for `n`, zero where nothing is: what is masked must be finite as well."""
        _, H, used, D = self.keys[0].shape
        before, which = (self.keys, self.values), torch.tensor(sequences, device=self._memory.device)
        self._lay_out(len(sequences), H, n, D)
        for layers, layers_before in zip((self.keys, self.values), before, strict=True):
            for kept, kept_before in zip(layers, layers_before, strict=True):
                copy = kept_before.index_select(0, which)  # the memory may be the same
                kept[:, :, :used], kept[:, :, used:] = copy, 0

    def _lay_out(self, *shape: int) -> None:
        flat = self._memory[..., : math.prod(shape)]
        self.keys, self.values = ([layer.view(shape) for layer in half] for half in flat)


class Layer(NamedTuple):
    """What a block is made of."""

    ln_1: nn.LayerNorm
    c_attn: Linear
    attn_proj: Linear
    ln_2: nn.LayerNorm
    c_fc: Linear  # with its gelu
    mlp_proj: Linear


class Decoder:
    """A GPT as it is in eval mode; the weights are the model's own in fp32, and copies of them otherwise."""

    def __init__(self, model: GPT, precision: Precision = "fp32") -> None:
        config = model.config
        self.dtype, self.trained_length, self.vocabulary = DTYPES[precision], model.trained_length, model.vocabulary
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.wte, self.wpe, self.ln_f = model.wte.weight.detach(), model.wpe.weight.detach(), model.ln_f
        self.head = _linear(self.wte, None, self.dtype)
        self.layers = [self._layer(block) for block in model.h]

    def new_cache(self, n_sequences: int, length: int | None = None) -> Cache:
        """A cache for sequences of `length` tokens, of the trained length at most."""
        limit = min(length or self.trained_length, self.trained_length)
        return Cache(len(self.layers), (n_sequences, self.n_head, self.head_size), limit, self.wpe[:0].to(self.dtype))

    @torch.inference_mode()
    def prefill(self, rows: Tensor, cache: Cache, sequences: list[int]) -> Tensor:
        """Read rows (B, T) as the beginnings of these sequences of the cache -> what the head reads, (B, T, C)."""
        T = rows.shape[1]
        cache.reserve(T)
        which = torch.tensor(sequences, device=rows.device)

        def attend_to_own(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer][which, :, :T], cache.values[layer][which, :, :T] = k, v
            return attend(q, k, v, dropout=0.0)

        return self._hidden(F.embedding(rows, self.wte) + self.wpe[:T], attend_to_own)

    @torch.inference_mode()
    def extend(self, rows: Tensor, lengths: list[int], cache: Cache) -> Tensor:
        """Read rows (B, T) on end of all sequences of the cache, `lengths` long so far -> (B, T, C).

        What is kept beyond a sequence's length, as of a guess that was wrong, is overwritten before it is seen.
        """
        B, T = rows.shape
        cache.reserve(max(lengths) + T)
        positions = torch.tensor(lengths, device=rows.device)[:, None] + torch.arange(T, device=rows.device)  # (B, T)
        unseen = torch.arange(cache.keys[0].shape[2], device=rows.device) > positions[:, :, None]  # (B, T, n)
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=rows.device).masked_fill_(unseen, -torch.inf)
        mask = mask.repeat_interleave(self.n_head, dim=0)  # (B * H, T, n)
        new: tuple[slice | Tensor, ...]
        if len(set(lengths)) == 1:  # a slice is written faster than what is full_tensor
            new = (slice(None), slice(None), slice(lengths[0], lengths[0] + T))
        else:
            new = (
                torch.arange(B, device=rows.device)[:, None, None],
                torch.arange(self.n_head, device=rows.device)[:, None],
                positions[:, None],
            )

        def attend_to_kept(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]  # (B, H, n, D) each
            keys[new], values[new] = k, v
            q, keys, values = q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)  # (B * H, ...)
            scores = torch.baddbmm(mask, q, keys.mT, alpha=self.head_size**-0.5)  # (B * H, T, n)
            return torch.bmm(scores.softmax(dim=2), values).view(B, self.n_head, T, self.head_size)

        return self._hidden(F.embedding(rows, self.wte) + F.embedding(positions, self.wpe), attend_to_kept)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> fp32 logits (..., V); -inf for what is never written: ids that no text has."""
        logits: Tensor = self.head(hidden.to(self.dtype)).float()
        first = self.vocabulary.n_rows - 1 if self.vocabulary.n_unused else FIRST_UNWRITTEN
        logits[..., first:] = -torch.inf
        return logits

    @torch.inference_mode()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of each of the targets (T,) after `hidden` (T, C), in nats, as GPT.token_losses has it."""
        logits, bias = self.head(hidden.to(self.dtype)).float(), self.vocabulary.unused_bias
        if self.vocabulary.n_unused:
            logits[:, -1] += bias
        return F.cross_entropy(logits, targets, reduction="none") + bias * (targets == self.vocabulary.n_rows - 1)

    def _hidden(self, x: Tensor, attend: Attend) -> Tensor:
        """Embedded positions (B, T, C) through all blocks, (B, T, C) again."""
        B, T, C = x.shape
        for i, layer in enumerate(self.layers):
            q, k, v = (
                part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                for part in layer.c_attn(_norm(x, layer.ln_1).to(self.dtype)).chunk(3, dim=2)
            )
            x = x + layer.attn_proj(attend(i, q, k, v).transpose(1, 2).reshape(B, T, C))
            x = x + layer.mlp_proj(layer.c_fc(_norm(x, layer.ln_2).to(self.dtype)))
        return _norm(x, self.ln_f)

    def _layer(self, block: nn.Module) -> Layer:
        assert isinstance(block, Block)
        c_attn, attn_proj, c_fc, mlp_proj = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
        return Layer(
            block.ln_1,
            _linear(c_attn.weight, c_attn.bias, self.dtype),
            _linear(attn_proj.weight, attn_proj.bias, self.dtype),
            block.ln_2,
            _linear(c_fc.weight, c_fc.bias, self.dtype, gelu=True),
            _linear(mlp_proj.weight, mlp_proj.bias, self.dtype),
        )


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The layer without what torch does to call a module, which is a good part of so short a step."""
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False) -> Linear:
    """x -> x @ weight.T + bias in `dtype`, and GPT-2's gelu of that.

    With few positions a product takes as long as its weights take to arrive. In bf16 on a CPU oneDNN reads them up to
    twice as fast in a layout of its own, which torch.compile uses as well.
    """
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if weight.device.type == "cpu" and dtype == torch.bfloat16:
        packed, then = torch.ops.mkldnn._reorder_linear_weight(weight), "gelu" if gelu else "none"
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "tanh" if gelu else "")
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return lambda x: F.linear(x, weight, bias)
