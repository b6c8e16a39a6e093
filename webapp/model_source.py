"""source: a version's folder -> what the page needs of it; which version that is may change between two requests."""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.model.generator import Generator, load_generator
from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import read_json

LEAST_FACTS = {"name": "model", "version": "?", "aliases": [], "tags": {}, "params": {}, "environment": {}}
LEAST_FACTS |= {"history": {}, "samples": [], "metrics": {}, "created": "unknown"}


class Served:
    """One version, loaded: its generator, its training text and what is known of the run behind it."""

    def __init__(self, generator: Generator, facts: dict[str, Any]) -> None:
        assert generator.corpus is not None, "a version comes with its tokens"
        self.generator, self.facts = generator, LEAST_FACTS | facts
        self.tokenizer, self.corpus = generator.tokenizer, generator.corpus
        self.label = f"{self.facts['name']} version {self.facts['version']}"

    @property
    def ids(self) -> np.ndarray:
        """(N,) tokens of the training text, of a long one the beginning."""
        return self.corpus.ids

    @property
    def window(self) -> int:
        """Tokens in a window that the model was trained on."""
        return self.generator.trained_length

    @cached_property
    def _text(self) -> tuple[bytes, np.ndarray]:
        """The training text in lower case (of ASCII), and where each token begins in it."""
        length_of = np.array([len(self.tokenizer.decode_bytes([i])) for i in range(self.tokenizer.n_vocab)])
        return self.tokenizer.decode_bytes(self.ids.tolist()).lower(), np.append(0, length_of[self.ids].cumsum())

    def find(self, words: str, after: int) -> tuple[int, int] | None:
        """The next place after token `after`, from the start again after the last one, where `words` stand: its tokens.

        Upper and lower case are alike. None where there is no such place.
        """
        text, begins = self._text
        wanted = words.encode("utf-8", errors="replace").lower()
        if not wanted:
            return None
        found = text.find(wanted, int(begins[min(after + 1, len(begins) - 1)]))
        found = text.find(wanted) if found < 0 else found
        if found < 0:
            return None
        first, last = np.searchsorted(begins, [found, found + len(wanted) - 1], side="right") - 1
        return int(first), int(last) + 1


class Source(Protocol):
    """Where versions come from."""

    trouble: str | None  # why the version that is served is not the one that should be; None where all is well

    def current(self) -> Served:
        """The version to serve the next request with."""

    def versions(self) -> list[str]:
        """The numbers there are, newest first."""

    def open(self, number: str) -> Served:
        """Any one of them. Raises a PipelineError where it cannot be loaded."""


class Folder:
    """A single version in a folder: model/, tokens/ and facts.json, as in an exported Space."""

    trouble: str | None = None

    def __init__(self, folder: Path) -> None:
        for part in (folder, folder / "model", folder / "tokens", folder / "facts.json"):
            if not part.exists():
                raise ModelMissing(f"{part} not found: `python -m pipeline export space DIR` makes DIR/version")
        self._served = Served(load_generator(folder), read_json(folder / "facts.json"))

    def current(self) -> Served:
        return self._served

    def versions(self) -> list[str]:
        return [str(self._served.facts["version"])]

    def open(self, number: str) -> Served:
        if number not in self.versions():
            raise InputError(f"version {number!r} is not here: choose {self.versions()[0]}")
        return self._served
