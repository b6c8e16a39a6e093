"""Small models for tests."""

import torch

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT


def random_model(shape: ModelConfig, vocabulary: Vocabulary, noise: float) -> GPT:
    """A model whose weights are far from their initial values: two results are not equal by chance."""
    model = GPT(shape, vocabulary).initialise(seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model
