"""Load a version from a folder, and find words in its training text."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from pipeline.data.openings import openings
from pipeline.data.token_files import Tokens
from pipeline.model.generator import Generator, load_generator
from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import read_json
from webapp.engine import Engine

N_EXAMPLES = 5
EXAMPLE_CHARACTERS = 70  # at most
PASSAGE_TOKENS, PASSAGE_BYTES = 8, 26  # the shortest passage that counts as copied: as long as both
MEASURED_TOKENS = 100_000  # at most, for the mean length of a token


class Served:
    """A loaded version: its generator, the engine that runs it, its training text, and `info`, the version info."""

    def __init__(self, generator: Generator, info: dict[str, Any]) -> None:
        assert generator.corpus is not None, "a version comes with its tokens"
        self.generator, self.engine, self.info = generator, Engine(generator), info
        self.tokenizer, self.corpus = generator.tokenizer, generator.corpus
        self.label = f"{self.info['name']} version {self.info['version']}"
        self.window = generator.trained_length  # tokens in a training window
        self.held_out = bool((info.get("rule") or {}).get("held_out"))  # whether its target is the loss of other text

    @property
    def ids(self) -> np.ndarray:
        """Token ids of the training text, (N,); of a long text, only the first ones."""
        return self.corpus.ids

    @cached_property
    def min_passage(self) -> int:
        """Consecutive tokens that must occur in the training text to count as copied; a token may be one character."""
        ids = self.ids[:MEASURED_TOKENS].tolist()
        return max(PASSAGE_TOKENS, round(PASSAGE_BYTES * len(ids) / max(1, len(self.tokenizer.decode_bytes(ids)))))

    @cached_property
    def examples(self) -> list[str]:
        """Openings of lines of the training text, as prompts."""
        tokens = Tokens("text", [self.ids], self.tokenizer.n_vocab)
        return openings(tokens, self.tokenizer, N_EXAMPLES, EXAMPLE_CHARACTERS)

    @cached_property
    def _text(self) -> tuple[bytes, np.ndarray]:
        """The training text, and the byte offset of each token in it."""
        length_of = np.array([len(self.tokenizer.decode_bytes([i])) for i in range(self.tokenizer.n_vocab)])
        return self.tokenizer.decode_bytes(self.ids.tolist()), np.append(0, length_of[self.ids].cumsum())

    def contains(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids` occurs in the training text, also where that has other tokens."""
        return self.tokenizer.decode_bytes(ids) in self._text[0]

    def find(self, words: str, after: int) -> tuple[int, int] | None:
        """Token range [first, end) of the next occurrence of `words` after token `after`, or None.

        The search ignores case, and continues from the start of the text.
        """
        text, begins = self._text
        wanted = any_case(words)
        found = wanted.search(text, int(begins[min(after + 1, len(begins) - 1)])) or wanted.search(text)
        if not found or not words:
            return None
        first, last = np.searchsorted(begins, [found.start(), found.end() - 1], side="right") - 1
        return int(first), int(last) + 1


def any_case(words: str) -> re.Pattern[bytes]:
    """The pattern of `words` in UTF-8, each character in lower or upper case: the text need not be decoded."""
    cases = [{each, each.lower(), each.upper(), each.upper().lower()} for each in words]
    return re.compile(b"".join(b"(?:%b)" % b"|".join(map(_escaped, sorted(each))) for each in cases))


def _escaped(text: str) -> bytes:
    return re.escape(text.encode("utf-8", errors="replace"))


class Listed(NamedTuple):
    """A version that can be opened."""

    number: str
    aliases: list[str]
    created: int  # seconds since 1970


class Source(Protocol):
    """A source of versions; the version that it serves may change between two requests."""

    trouble: str | None  # why the requested version could not be loaded

    def current(self) -> Served:
        """The version to serve the next request with."""

    def versions(self) -> list[str]:
        """All version numbers, newest first."""

    def listed(self) -> list[Listed]:
        """All versions, newest first, as the registry has them now. Raises ModelMissing if it does not answer."""

    def open(self, number: str) -> Served:
        """Load one of them. Raises a PipelineError if that fails."""


class Folder:
    """A single version in a folder: model/, tokens/ and version.json, as in an exported Space."""

    trouble: str | None = None

    def __init__(self, folder: Path, precision: Literal["auto", "fp32", "bf16"] = "auto") -> None:
        for part in (folder, folder / "model", folder / "tokens", folder / "version.json"):
            if not part.exists():
                raise ModelMissing(f"{part} not found: `python -m pipeline export space DIR` makes DIR/version again")
        self._served = Served(load_generator(folder, precision), read_json(folder / "version.json", "export it again"))

    def current(self) -> Served:
        return self._served

    def versions(self) -> list[str]:
        return [str(self._served.info["version"])]

    def listed(self) -> list[Listed]:
        info = self._served.info
        created = datetime.fromisoformat(info["created"]).replace(tzinfo=UTC)
        return [Listed(number, info["aliases"], int(created.timestamp())) for number in self.versions()]

    def open(self, number: str) -> Served:
        if number not in self.versions():
            raise InputError(f"version {number!r} is not here: choose {self.versions()[0]}")
        return self._served
