"""text: what the stage `tokenize` wrote -> the rows that a run learns."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.data.batches import Rows
from pipeline.data.token_files import data_sha256, open_tokens
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.system.device import Machine
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig


@dataclass(frozen=True)
class Text:
    """What a run learns, as the model's rows."""

    train: Rows
    validation: Rows | None  # None where nothing is held out
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    data_sha256: str

    @classmethod
    def read(cls, tokens: Path, bpe: Path, config: RunConfig, machine: Machine) -> "Text":
        """Read and verify what the stage `tokenize` wrote."""
        train = open_tokens(tokens, "train")
        train.require(config.windows.seq_len + 1)
        held_out, size = open_tokens(tokens, "val"), config.model.vocab_size
        if (n_ids := max(train.vocab_size, held_out.vocab_size)) > size:
            raise InputError(f"{tokens} has {n_ids} ids, model.vocab_size is {size}: make model.vocab_size larger")
        vocabulary = Vocabulary.of(train.counts(), size) if config.model.fold_vocab else Vocabulary.full(size)
        validation = Rows(held_out, vocabulary, machine.device) if len(held_out) > 1 else None
        if validation is None and (need := config.target.needs_held_out):
            raise InputError(f"{need}, but nothing is held out: set corpus.val_fraction above 0")
        rows = Rows(train, vocabulary, machine.device)
        return cls(rows, validation, vocabulary, load_tokenizer(bpe), data_sha256(tokens))
