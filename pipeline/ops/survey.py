"""Measure a text: its size, and in the ids of a tokenizer its tokens, their entropy and the lowest possible losses."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config.params import Params, load_params
from pipeline.config.sections import CorpusConfig
from pipeline.data.corpus import fetch_corpus, write_documents
from pipeline.data.documents import is_table
from pipeline.data.encode import training_blocks
from pipeline.data.statistics import (
    STATISTICS_TOKENS,
    Integers,
    ambiguity,
    counts_loss,
    irreducible_loss,
    next_token_entropy,
)
from pipeline.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from pipeline.ops.sources import Source
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import sha256_file

SURVEYED_BYTES = 1 << 25  # at most, from the beginning of the text; encoding them takes seconds
COUNTED_TOKENS = 1_000_000  # at most, for n-gram counts; takes about 5 s
AMBIGUITY_TOKENS = 500  # fewest, of which an ambiguity is computed
LENGTHS = (32, 64, 128, 256)  # tokens in a window, of which a plan chooses


@dataclasses.dataclass(frozen=True)
class Text:
    """A text's file, size and hash, and its beginning."""

    path: Path
    sha256: str
    n_documents: int
    n_bytes: int
    notes: tuple[str, ...]  # what was normalised
    sample: bytes  # at most SURVEYED_BYTES, whole characters; documents end with NUL

    @property
    def scale(self) -> float:
        """Size of the text in samples."""
        return self.n_bytes / len(self.sample)

    def first(self, share: float) -> "Text":
        """The text's first `share`, for which the sample is cut if it is longer."""
        n = min(len(self.sample), math.ceil(share * self.n_bytes))
        return dataclasses.replace(
            self, n_bytes=math.ceil(share * self.n_bytes), sample=self.sample[:n].decode(errors="ignore").encode()
        )

    @property
    def characters(self) -> int:
        """Number of characters in the sample."""
        return len(self.sample.decode())

    @property
    def ascii_share(self) -> float:
        """Share of ASCII among the bytes of the sample."""
        return float((np.frombuffer(self.sample, np.uint8) < 128).mean())


@dataclasses.dataclass(frozen=True)
class Measured:
    """A text in the ids of a tokenizer; losses in nats per token."""

    tokenizer: str
    n_tokens: int  # of the whole text; estimated from the sample if this is shorter
    n_vocab: int  # ids of the tokenizer
    n_used: int  # ids that occur in the sample
    entropy: float  # of a token by itself
    lowest_loss: dict[int, float]  # windows' length -> the loss from anywhere that no model can get below

    ids: Integers  # of the sample's beginning, at most STATISTICS_TOKENS

    def ambiguity(self, n_tokens: int) -> float:
        """`ambiguity` of the text's first tokens, in nats: the longer a text, the more often its passages occur."""
        return float(np.interp(math.log(n_tokens), *self._ambiguities))

    @cached_property
    def _ambiguities(self) -> tuple[list[float], list[float]]:
        """Logarithms of some numbers of tokens, and the ambiguity of so many."""
        sizes = [len(self.ids)]
        while sizes[-1] >= 2 * AMBIGUITY_TOKENS:
            sizes.append(sizes[-1] // 2)
        return [math.log(n) for n in sizes[::-1]], [ambiguity(self.ids[:n]) for n in sizes[::-1]]

    def loss_of_counts(self, share: float) -> float:
        """Loss of n-gram counts on the last `share` of the ids."""
        ids = self.ids[:COUNTED_TOKENS]
        return counts_loss(ids, max(1, round(share * len(ids))))


def corpus_config(source: Source, column: str | None) -> CorpusConfig:
    """The section `corpus` for a text. Raises InputError for an invalid URL, or for a `column` of files without any."""
    if column is not None and source.files and not any(map(is_table, source.files)):
        raise InputError(f"--column {column}: {source.origin} has no table: leave --column out")
    values = load_params().values["corpus"] | {"source": source.source, "column": column}
    return Params({"corpus": values | {"sha256": None, "mirrors": []}}, Path("SOURCE")).section(CorpusConfig)


def read_text(source: Source, config: CorpusConfig, folder: Path) -> Text:
    """Read the whole text, with a copy in `folder`. Raises as `fetch_corpus` does."""
    corpus = folder / "corpus.txt"
    notes = _write_corpus(source, config, corpus)
    with corpus.open("rb") as file:
        sample = file.read(SURVEYED_BYTES)
        n_documents = 1 + sample.count(0)
        while block := file.read(SURVEYED_BYTES):
            n_documents += block.count(0)
    whole = sample.decode(errors="ignore").encode()  # without the part of a character at the end
    if not whole.strip(b"\0 \t\r\n"):
        raise InputError(f"{source.origin} contains no text: give another text")
    return Text(corpus, sha256_file(corpus), n_documents, corpus.stat().st_size, tuple(notes), whole)


def _write_corpus(source: Source, config: CorpusConfig, corpus: Path) -> list[str]:
    """Write the text to `corpus`; return what was normalised."""
    if source.files:
        return write_documents(source.files, corpus, source.origin, config.column)
    with redirect_stdout(sys.stderr):
        fetch_corpus(config, corpus)
    return []


def measure(text: Text, name: str, folder: Path, lengths: Sequence[int] = LENGTHS) -> Measured:
    """Encode the sample with the tokenizer `name`, whose files are made in `folder` if data/tokenizer is another one.

    Raises InputError or IntegrityError if the tokenizer cannot be made.
    """
    tokenizer = tokenizer_for(text, name, folder)
    ids = tokenizer.encode_documents(text.sample)
    first = ids[:STATISTICS_TOKENS].astype(np.int64)
    return Measured(
        tokenizer=name,
        n_tokens=round(len(ids) * text.scale),
        n_vocab=tokenizer.n_vocab,
        n_used=len(np.unique(ids)),
        entropy=next_token_entropy(first, (0,))["0"],
        lowest_loss={int(T): loss for T, loss in irreducible_loss(first, lengths, ("sliding",))["sliding"].items()},
        ids=first,
    )


def tokenizer_for(text: Text, name: str, folder: Path) -> Tokenizer:
    """The tokenizer `name`: that of data/tokenizer, of an earlier call, or one that is made in `folder`."""
    place = folder / name.replace(":", "-")
    if place.is_dir():
        return load_tokenizer(place)
    try:
        if (there := load_tokenizer(Path("data/tokenizer"))).name == name and not there.trained:
            return there
    except (InputError, IntegrityError):
        pass
    with redirect_stdout(sys.stderr):
        return make_tokenizer(name, place, training_blocks(text.sample, len(text.sample)))
