"""generate: prompt -> text, token by token, never past the length that the model was trained on."""

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.model import GPT
from pipeline.tokenizer import Tokenizer

GPT2_VOCABULARY = 50257  # ids from here on are padding


@torch.inference_mode()
def continue_rows(model: GPT, rows: Tensor, n_new: int, temperature: float, top_k: int, seed: int) -> Tensor:
    """Append `n_new` rows to each of `rows` (B, T); greedy at temperature 0, `top_k` 0 leaves all.

    The context is cropped to the last `trained_length` positions. The representative of the ids that never occur is
    never drawn, nor is a padded one.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_new):
        hidden = model.hidden(rows[:, -model.trained_length :])[:, -1]  # (B, C)
        logits = model.head(hidden).float().cpu()  # (B, V)
        if model.vocabulary.n_unused:
            logits[:, -1] = -torch.inf
        elif model.config.vocab_size > GPT2_VOCABULARY:
            logits[:, GPT2_VOCABULARY:] = -torch.inf
        rows = torch.cat([rows, _draw(logits, temperature, top_k, generator).to(rows.device)], dim=1)
    return rows


def generate(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """Continue `prompt` by `max_tokens` tokens; return the prompt with its continuation.

    An empty prompt begins with <|endoftext|>, as GPT-2's own does; the same seed gives the same text. Raises InputError
    for numbers out of range.
    """
    if max_tokens < 0 or not temperature >= 0 or top_k < 0:
        raise InputError("max_tokens, temperature and top_k: choose 0 or more")
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    was_training = model.training
    model.eval()
    rows = model.vocabulary.fold(torch.tensor([ids])).to(model.wte.weight.device)
    new = continue_rows(model, rows, max_tokens, temperature, top_k, seed)[0, len(ids) :].cpu()
    model.train(was_training)
    return prompt + tokenizer.decode(model.vocabulary.unfold(new).tolist())


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw one row a sequence, (B, 1), from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    if 0 < top_k < logits.shape[1]:
        kth = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
