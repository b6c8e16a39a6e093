"""Small models for tests."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.system.files import write_json


def random_model(shape: ModelConfig, vocabulary: Vocabulary, noise: float) -> GPT:
    """A model whose weights are far from their initial values: two results are not equal by chance."""
    model = GPT(shape, vocabulary).initialise(seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def save_published(folder: Path, vocab_size: int = 60, noise: float = 0.1, **config: Any) -> GPT:
    """Write published weights of 2 blocks and 12 positions; return the model. `config`: further keys of its JSON."""
    from pipeline.registry.export import hf_weights

    shape = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=vocab_size, dropout=0.0, fold_vocab=False
    )
    model = random_model(shape, Vocabulary.full(vocab_size), noise)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hf_weights(model, vocab_size), folder / "model.safetensors", {"format": "pt"})
    blocks = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": vocab_size}
    write_json(folder / "config.json", {"model_type": "gpt2", **blocks, **config})
    return model
