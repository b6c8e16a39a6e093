"""The GPT-2 network."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, noop_context_fn

from pipeline.config.sections import ModelConfig
from pipeline.data.batches import IGNORED
from pipeline.data.vocab import Vocabulary
from pipeline.model.dropout import dropout
from pipeline.model.fsdp import assign
from pipeline.model.loss import cross_entropy_sum

# Shapes. B: windows in a batch, T: positions in a window, C: n_embd, H: n_head, V: compact ids, which are all ids or,
# after folding, those of the training text (data/vocab.py). Source: Radford et al. 2019, and the configuration of the
# published weights.

SHORT = 512  # positions up to which `attend` computes all scores, (T, T), at once


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal attention of queries on keys and values, (B, H, T, C / H) each, with dropout `p` of the weights.

    Uses torch's kernel, except on a CPU with dropout, and for up to SHORT positions in bf16: there, two plain matrix
    products are more than twice as fast.
    """
    T = q.shape[2]
    if q.device.type != "cpu" or (not p and (q.dtype != torch.bfloat16 or T > SHORT)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    future = q.new_full((T, T), -torch.inf).triu(1)
    scores = (q * q.shape[3] ** -0.5) @ k.mT + future  # (B, H, T, T)
    return dropout(scores.softmax(dim=-1), p) @ v


class _SigmoidGELU(torch.autograd.Function):
    """GELU (tanh) as x * sigmoid(z), z = SLOPE * (x + CUBIC * x^3), because tanh takes four times as long on a CPU.

    tanh(z / 2) = 2 * sigmoid(z) - 1. The sigmoid is kept for the backward pass.
    """

    SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope, cubic = _SigmoidGELU.SLOPE, _SigmoidGELU.CUBIC
        sigmoid = x.square().mul_(slope * cubic).add_(slope).mul_(x).sigmoid_()
        ctx.save_for_backward(x, sigmoid)
        return x * sigmoid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x, sigmoid), slope, cubic = ctx.saved_tensors, _SigmoidGELU.SLOPE, _SigmoidGELU.CUBIC
        slopes = x.square().mul_(3 * slope * cubic).add_(slope).mul_(x)  # x * dz/dx
        slopes.addcmul_(slopes, sigmoid, value=-1).add_(1).mul_(sigmoid)  # sigmoid * (1 + x * dz/dx * (1 - sigmoid))
        return slopes.mul_(gradients[0])  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    """GPT-2's approximation of GELU; in training in fp32 on a CPU without tanh."""
    if x.requires_grad and x.device.type == "cpu" and x.dtype == torch.float32:
        return _SigmoidGELU.apply(x)  # type: ignore[no-any-return, no-untyped-call]
    return F.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.p = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C / H)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = attend(q, k, v, self.p if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return dropout(y, self.p, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.p = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(gelu(self.c_fc(x)))
        return dropout(x, self.p, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


def through(block: nn.Module, x: Tensor) -> Tensor:
    """Apply a block; torch.compile compiles this function once for all blocks."""
    return block(x)  # type: ignore[no-any-return]


def _same_mps_dropout() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward pass and of its recomputation, which gets the same random numbers of MPS.

    torch does this for the CPU and for CUDA only.
    """
    before = torch.mps.get_rng_state()

    @contextmanager
    def repeating() -> Iterator[None]:
        now = torch.mps.get_rng_state()
        torch.mps.set_rng_state(before)
        try:
            yield
        finally:  # the recomputation is ended by an exception
            torch.mps.set_rng_state(now)

    return nullcontext(), repeating()


class Embedding(nn.Embedding):
    """Makes no initial values on the device `meta`, for which torch would import its compiler, in a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class GPT(nn.Module):
    """GPT-2 with learned positions and a head tied to the embedding, on compact ids of `vocabulary`.

    `compiled` and `gradient_checkpointing` apply only in training.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, gradient_checkpointing: bool = False, compiled: bool = False
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.gradient_checkpointing = gradient_checkpointing
        self._through = torch.compile(through, dynamic=False) if compiled else through
        self.trained_length = config.block_size  # later positions have not been trained
        self.wte = Embedding(vocabulary.n_rows, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    @torch.no_grad()
    def initialise(self, seed: int) -> Self:
        """Initialise like GPT-2: normal(0, 0.02), smaller in layers that add to the residual stream; biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                assign(parameter, torch.randn(parameter.shape, generator=generator) * 0.02 * scale)
            else:
                parameter.fill_(1)  # the LayerNorms' weights
        return self

    def freeze(self, n_blocks: int) -> Self:
        """Exclude the embeddings and the first `n_blocks` blocks from training, unless `n_blocks` is 0.

        The embeddings too: otherwise the backward pass would go through the blocks that are not trained.
        """
        for module in (self.wte, self.wpe, *self.h[:n_blocks]) if n_blocks else ():
            module.requires_grad_(False)
        return self

    def hidden(self, compact_ids: Tensor) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T)."""
        T = compact_ids.shape[1]
        assert self.config.block_size >= T, "more tokens than the model has positions"
        x = self.wte(compact_ids) + self.wpe.weight[:T]  # (B, T, C)
        x = dropout(x, self.config.dropout, self.training)
        run = self._through if self.training else through
        again = _same_mps_dropout if x.device.type == "mps" else noop_context_fn
        for block in self.h:
            recompute = self.gradient_checkpointing and self.training
            x = checkpoint(run, block, x, use_reentrant=False, context_fn=again) if recompute else run(block, x)
        return self.ln_f(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C); the last one represents all ids that the training text lacks."""
        if not self.vocabulary.n_unused:
            return F.linear(hidden, self.wte.weight)
        bias = self.wte.weight.new_zeros(self.vocabulary.n_rows)  # (V,)
        bias[-1] = self.vocabulary.unused_bias
        return F.linear(hidden, self.wte.weight, bias)

    def forward(self, compact_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.head(self.hidden(compact_ids))

    def loss(self, inputs: Tensor, targets: Tensor, n_targets: int) -> Tensor:
        """Sum of the targets' losses / `n_targets`, in nats per token; softmax in fp32, IGNORED targets left out."""
        hidden = self.hidden(inputs).flatten(0, 1)  # (B * T, C)
        return cross_entropy_sum(hidden, self.wte.weight, self.vocabulary.unused_bias, targets.flatten()) / n_targets

    def token_losses(self, inputs: Tensor, targets: Tensor, first: int = 0) -> Tensor:
        """Loss of each target from position `first` on, (B, T - first), 0 for IGNORED ones; softmax in fp32."""
        return self.losses_of(self.hidden(inputs)[:, first:], targets[:, first:])

    def losses_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`token_losses` from the hidden states (B, T, C) of the inputs.

        A target that does not occur in the training text is one of the U ids that the last row represents.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(hidden.float())  # (B, T, V)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        if self.vocabulary.n_unused:
            losses = losses + self.vocabulary.unused_bias * (targets.flatten() == self.vocabulary.n_rows - 1)
        return losses.view_as(targets)
