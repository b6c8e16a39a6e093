"""decoder: a GPT -> the same GPT laid out for writing: keys and values kept, weights packed, the head where asked.

B: sequences, T: new positions of each, n: positions kept, C: n_embd, H: n_head, D: C / H, V: rows of the embedding. The
residual stream, the norms and the logits are fp32; matrix products, keys and values are in the precision, as under
autocast in training.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model import GPT, Block, attend

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Linear = Callable[[Tensor], Tensor]  # (..., C_in) -> (..., C_out)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer and its q, k, v, (B, H, T, D) each -> (B, H, T, D)

FIRST_UNWRITTEN = 50256  # <|endoftext|>, which no text encodes to; the ids after it are padding
GROWTH = 64  # positions; oneDNN compiles a kernel for each new shape, and reads what lies in one piece faster


class Cache:
    """Keys and values of a batch of sequences, (n_layer, B, H, n, D); n grows up to `limit`."""

    def __init__(self, keys: Tensor, limit: int) -> None:
        """`keys`: (n_layer, B, H, 0, D), of the dtype and on the device that all of it is to have."""
        self.keys, self.values, self.limit = keys, keys.clone(), limit

    def reserve(self, n: int) -> None:
        """Make room for `n` positions."""
        missing = min(-(-n // GROWTH) * GROWTH, self.limit) - self.keys.shape[3]
        if missing > 0:
            self.keys, self.values = (F.pad(kept, (0, 0, 0, missing)) for kept in (self.keys, self.values))

    def select(self, sequences: list[int]) -> None:
        """Keep these sequences alone, in this order."""
        self.keys, self.values = self.keys[:, sequences], self.values[:, sequences]


class Layer(NamedTuple):
    """A block's parameters."""

    ln_1: nn.LayerNorm
    c_attn: Linear
    attn_proj: Linear
    ln_2: nn.LayerNorm
    c_fc: Linear
    mlp_proj: Linear


class Decoder:
    """A GPT as it is in eval mode; the weights are the model's own in fp32, and copies of them otherwise."""

    def __init__(self, model: GPT, precision: Precision = "fp32") -> None:
        config = model.config
        self.dtype, self.trained_length, self.vocabulary = DTYPES[precision], model.trained_length, model.vocabulary
        self.n_head, self.shape = config.n_head, (config.n_layer, config.n_head, config.n_embd // config.n_head)
        self.wte, self.wpe, self.ln_f = model.wte.weight.detach(), model.wpe.weight.detach(), model.ln_f
        self.head = _linear(self.wte, None, self.dtype)
        self.layers = [self._layer(block) for block in model.h]

    def new_cache(self, n_sequences: int) -> Cache:
        n_layer, H, D = self.shape
        return Cache(self.wte.new_empty((n_layer, n_sequences, H, 0, D), dtype=self.dtype), self.trained_length)

    @torch.inference_mode()
    def prefill(self, rows: Tensor, cache: Cache, sequences: list[int]) -> Tensor:
        """Read rows (B, T) as the beginnings of these sequences of the cache -> what the head reads, (B, T, C)."""
        T = rows.shape[1]
        cache.reserve(T)
        which = torch.tensor(sequences, device=rows.device)

        def attend_to_own(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer, which, :, :T], cache.values[layer, which, :, :T] = k, v
            return attend(q, k, v, dropout=0.0)

        return self._hidden(self.wte[rows] + self.wpe[:T], attend_to_own)

    @torch.inference_mode()
    def extend(self, rows: Tensor, lengths: Tensor, cache: Cache) -> Tensor:
        """Read rows (B, T) on end of all sequences of the cache, `lengths` (B,) long so far -> (B, T, C).

        What is kept beyond a sequence's length, as of a guess that was wrong, is overwritten before it is seen.
        """
        T = rows.shape[1]
        positions = lengths[:, None] + torch.arange(T, device=rows.device)  # (B, T)
        cache.reserve(int(positions.max()) + 1)
        unseen = torch.arange(cache.keys.shape[3], device=rows.device) > positions[:, :, None]  # (B, T, n)
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=rows.device).masked_fill_(unseen, -torch.inf)
        mask, sequence = mask[:, None], torch.arange(len(rows), device=rows.device)[:, None]  # (B, 1, T, n), (B, 1)

        def attend_to_kept(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]  # (B, H, n, D) each
            keys[sequence, :, positions], values[sequence, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
            scores: Tensor = (q * q.shape[3] ** -0.5) @ keys.mT + mask  # (B, H, T, n)
            return scores.softmax(dim=-1) @ values

        return self._hidden(self.wte[rows] + self.wpe[positions], attend_to_kept)

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
                for part in layer.c_attn(layer.ln_1(x).to(self.dtype)).chunk(3, dim=2)
            )
            x = x + layer.attn_proj(attend(i, q, k, v).transpose(1, 2).reshape(B, T, C))
            x = x + layer.mlp_proj(F.gelu(layer.c_fc(layer.ln_2(x).to(self.dtype)), approximate="tanh"))
        return self.ln_f(x)  # type: ignore[no-any-return]

    def _layer(self, block: nn.Module) -> Layer:
        assert isinstance(block, Block)
        linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        c_attn, attn_proj, c_fc, mlp_proj = (_linear(linear.weight, linear.bias, self.dtype) for linear in linears)
        return Layer(block.ln_1, c_attn, attn_proj, block.ln_2, c_fc, mlp_proj)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """x -> x @ weight.T + bias in `dtype`.

    With few positions a product takes as long as its weights take to arrive. In bf16 on a CPU oneDNN reads them up to
    twice as fast in a layout of its own, which torch.compile uses as well.
    """
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if weight.device.type != "cpu" or dtype != torch.bfloat16:
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], None)
