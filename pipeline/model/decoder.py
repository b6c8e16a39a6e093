"""Incremental inference for a GPT: KV cache, packed weights, logits only where requested."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.gpt import GPT, Block, attend

# Shapes. B: sequences, T: new positions of each, n: positions in the cache, C: n_embd, H: n_head, D: C / H, V: compact
# ids. The residual stream, the norms and the logits are fp32. Matrix products, keys and values are in the chosen
# precision, as under autocast in training.

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Linear = Callable[[Tensor], Tensor]  # (..., C_in) -> (..., C_out)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer and its q, k, v, (B, H, T, D) each -> (B, H, T, D)

GROWTH = 64  # positions added at once: oneDNN compiles a kernel for each new shape, and reads contiguous memory faster


class KVCache:
    """Keys and values of `n_sequences`, which join and leave: `keys[layer]` and `values[layer]`, (R, H, n, D) each.

    Sequence i has row i. R and n grow; later rows, and later positions of a row, hold nothing that is read.
    """

    def __init__(self, n_layer: int, shape: tuple[int, int], limit: int, like: Tensor) -> None:
        """`shape`: H and D; `limit`: the largest n; `like`: a tensor with the cache's dtype and device."""
        H, D = shape
        self.limit, self.n_sequences = limit, 0
        self.keys = [like.new_zeros((0, H, 0, D)) for _ in range(n_layer)]
        self.values = [like.new_zeros((0, H, 0, D)) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """n, the allocated positions of each sequence."""
        return self.keys[0].shape[2]

    def reserve(self, n: int) -> None:
        """Allocate at least `n` positions. New ones are zero, because even masked values must be finite."""
        if n > self.length:
            added = min(-(-n // GROWTH) * GROWTH, self.limit) - self.length
            self._replace(lambda x: F.pad(x, (0, 0, 0, added)))

    def add(self, n_sequences: int = 1) -> None:
        """Append sequences without any position. The number of rows doubles when all are in use."""
        self.n_sequences += n_sequences
        rows = self.keys[0].shape[0]
        if self.n_sequences > rows:
            added = max(self.n_sequences, 2 * rows if rows else 0) - rows
            self._replace(lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 0, added)))

    @torch.inference_mode()
    def remove(self, sequence: int) -> None:
        """Remove one sequence; the last one gets its number. The cache of no sequence is empty."""
        self.n_sequences -= 1
        if not self.n_sequences:
            self._replace(lambda x: x[:0, :, :0].clone())
        elif sequence < self.n_sequences:
            for x in (*self.keys, *self.values):
                x[sequence] = x[self.n_sequences]

    def shorten(self, n: int) -> None:
        """Free the positions after the first `n` if they are at least half of a long cache: every step reads them."""
        if self.length > max(2 * GROWTH, 2 * n):
            self._replace(lambda x: x[:, :, : -(-n // GROWTH) * GROWTH].contiguous())

    @torch.inference_mode()
    def _replace(self, changed: Callable[[Tensor], Tensor]) -> None:
        for layers in (self.keys, self.values):
            layers[:] = [changed(x) for x in layers]


class Layer:
    """The packed weights of one block."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, Block)
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.c_attn, self.attn_proj = _linear(block.attn.c_attn, dtype), _linear(block.attn.c_proj, dtype)
        self.c_fc, self.mlp_proj = _linear(block.mlp.c_fc, dtype, gelu=True), _linear(block.mlp.c_proj, dtype)


class Decoder:
    """A GPT in eval mode. In fp32 it shares the model's weights; in other precisions it has copies."""

    def __init__(self, model: GPT, precision: Precision = "fp32", n_vocab: int | None = None) -> None:
        """`n_vocab`: number of ids of the tokenizer; the model's ids beyond them are padding and are never sampled."""
        config = model.config
        self.precision = precision
        self.dtype, self.trained_length, self.vocabulary = DTYPES[precision], model.trained_length, model.vocabulary
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.wte, self.wpe, self.ln_f = model.wte.weight.detach(), model.wpe.weight.detach(), model.ln_f
        self.head = _linear(model.wte, self.dtype)
        self.layers = [Layer(block, self.dtype) for block in model.h]
        n_rows, n_unused = self.vocabulary.n_rows, self.vocabulary.n_unused
        self.n_sampled = n_rows - 1 if n_unused else n_vocab or n_rows  # compact ids that may be sampled

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one sequence of the trained length."""
        return 2 * len(self.layers) * self.trained_length * self.n_head * self.head_size * self.dtype.itemsize

    def new_cache(self, n_sequences: int = 0, length: int | None = None) -> KVCache:
        """A cache for sequences of `length` tokens, at most the trained length."""
        limit = min(length or self.trained_length, self.trained_length)
        cache = KVCache(len(self.layers), (self.n_head, self.head_size), limit, self.wpe[:0].to(self.dtype))
        cache.add(n_sequences)
        return cache

    @torch.inference_mode()
    def prefill(self, compact_ids: Tensor, cache: KVCache, sequences: list[int]) -> Tensor:
        """Process ids (B, T), the first tokens of `sequences`, and fill their cache; return hidden states (B, T, C)."""
        T = compact_ids.shape[1]
        cache.reserve(T)
        index = torch.tensor(sequences, device=compact_ids.device)

        def attend_to_new(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer][index, :, :T], cache.values[layer][index, :, :T] = k, v
            return attend(q, k, v, p=0.0)

        return self._hidden(F.embedding(compact_ids, self.wte) + self.wpe[:T], attend_to_new)

    @torch.inference_mode()
    def extend(self, compact_ids: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T), appended to all sequences of the cache.

        `lengths`: tokens of each sequence so far. Later positions in the cache, such as those of a rejected draft, are
        overwritten before they are read.
        """
        (B, T), device = compact_ids.shape, compact_ids.device
        cache.reserve(max(lengths) + T)
        positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        future = torch.arange(cache.length, device=device) > positions[:, :, None]  # (B, T, n)
        mask = torch.zeros(future.shape, dtype=self.dtype, device=device).masked_fill_(future, -torch.inf)
        mask = mask.repeat_interleave(self.n_head, dim=0)  # (B * H, T, n)
        new: tuple[slice | Tensor, ...]
        if len(set(lengths)) == 1:  # a slice is written faster than scattered positions
            new = (slice(None), slice(None), slice(lengths[0], lengths[0] + T))
        else:
            new = (
                torch.arange(B, device=device)[:, None, None],
                torch.arange(self.n_head, device=device)[:, None],
                positions[:, None],
            )

        def attend_to_cache(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer][:B], cache.values[layer][:B]  # (B, H, n, D) each
            keys[new], values[new] = k, v
            q, keys, values = q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)  # (B * H, ...)
            scores = torch.baddbmm(mask, q, keys.mT, alpha=self.head_size**-0.5)  # (B * H, T, n)
            return torch.bmm(scores.softmax(dim=2), values).view(B, self.n_head, T, self.head_size)

        return self._hidden(F.embedding(compact_ids, self.wte) + F.embedding(positions, self.wpe), attend_to_cache)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of hidden states (..., C); -inf for padding and for ids that the training text lacks."""
        return self.mask(self.all_logits(hidden))

    @torch.inference_mode()
    def mask(self, logits: Tensor) -> Tensor:
        """Set `all_logits`, (..., V), in place to -inf for what is never sampled."""
        logits[..., self.n_sampled :] = -torch.inf
        return logits

    @torch.inference_mode()
    def all_logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of hidden states (..., C); the last of a folded vocabulary is that of all other ids."""
        logits: Tensor = self.head(hidden.to(self.dtype)).float()
        if self.vocabulary.n_unused:
            logits[..., -1] += self.vocabulary.unused_bias
        return logits

    @torch.inference_mode()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target (T,), in nats, from `hidden` (T, C); equals GPT.token_losses."""
        losses = F.cross_entropy(self.all_logits(hidden), targets, reduction="none")
        return losses + self.vocabulary.unused_bias * (targets == self.vocabulary.n_rows - 1)

    def _hidden(self, x: Tensor, attend: Attend) -> Tensor:
        """Apply all blocks to embedded positions (B, T, C); returns hidden states (B, T, C)."""
        B, T, C = x.shape
        for i, layer in enumerate(self.layers):
            q, k, v = (
                part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                for part in layer.c_attn(_norm(x, layer.ln_1).to(self.dtype)).chunk(3, dim=2)
            )
            x = x + layer.attn_proj(attend(i, q, k, v).transpose(1, 2).reshape(B, T, C))
            x = x + layer.mlp_proj(layer.c_fc(_norm(x, layer.ln_2).to(self.dtype)))
        return _norm(x, self.ln_f)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm as a function: the overhead of calling a module is a large part of a step of one token."""
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(module: nn.Linear | nn.Embedding, dtype: torch.dtype, gelu: bool = False) -> Linear:
    """Return the function x -> x @ weight.T + bias in `dtype`, followed by GPT-2's GELU if `gelu`.

    An embedding has no bias. With few positions, a product takes as long as reading its weights. On a CPU in bf16,
    oneDNN reads them up to twice as fast in its own layout, which torch.compile uses too.
    """
    weight = module.weight.detach().to(dtype)
    bias = module.bias.detach().to(dtype) if isinstance(module, nn.Linear) else None
    if weight.device.type == "cpu" and dtype == torch.bfloat16:
        packed, activation = torch.ops.mkldnn._reorder_linear_weight(weight), "gelu" if gelu else "none"
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "tanh" if gelu else "")
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return lambda x: F.linear(x, weight, bias)
