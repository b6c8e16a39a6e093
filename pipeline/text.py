"""text: what the stage `tokenize` wrote -> the rows that a run learns, on its device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.machine import Machine
from pipeline.run_config import RunConfig
from pipeline.tokenizer import Tokenizer, load_tokenizer
from pipeline.tokens import data_sha256, open_tokens
from pipeline.vocab import Vocabulary


@dataclass(frozen=True)
class Text:
    """What a run learns, as the model's rows, on its device."""

    train: Tensor  # (N,)
    validation: Tensor | None  # (M,), None where nothing is held out
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    data_sha256: str

    @classmethod
    def read(cls, tokens: Path, bpe: Path, config: RunConfig, machine: Machine) -> "Text":
        """Read and verify what the stage `tokenize` wrote."""
        train = open_tokens(tokens, "train")
        train.require(config.windows.length + 1)
        size = config.model.vocab_size
        vocabulary = Vocabulary.of(train.counts(), size) if config.model.fold_vocab else Vocabulary.full(size)

        def rows(part: Any) -> Tensor:
            return vocabulary.fold(torch.from_numpy(part.read(0, len(part)).astype("int64"))).to(machine.device)

        held_out = open_tokens(tokens, "val")
        validation = rows(held_out) if len(held_out) > 1 else None
        if config.target.rule == "validation" and validation is None:
            raise InputError("target.rule is validation, but nothing is held out: set corpus.val_fraction above 0")
        return cls(rows(train), validation, vocabulary, load_tokenizer(bpe), data_sha256(tokens))
