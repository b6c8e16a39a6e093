"""A tokenizer from outside of the package, and a workspace of the stage `tokenize`."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import yaml

from pipeline.config.sections import CorpusConfig
from pipeline.data.corpus import fetch_corpus
from pipeline.data.tokenizer import TOKENIZERS, Tokenizer


class ByteTokenizer(Tokenizer):
    """Its tokens are the bytes of UTF-8."""

    files = ("bytes.txt",)
    name = "bytes"
    n_vocab, eot = 257, 256
    cut = re.compile(rb"[^\x80-\xbf]")  # before any character

    @classmethod
    def fetch(cls, folder: Path) -> None:
        (folder / "bytes.txt").write_text("one token per byte\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(b"<end>" if i == self.eot else bytes([i]) for i in ids)


@pytest.fixture(name="byte_tokenizer")
def _byte_tokenizer(monkeypatch: pytest.MonkeyPatch) -> ByteTokenizer:
    """A tokenizer with the name `bytes` in TOKENIZERS."""
    monkeypatch.setitem(TOKENIZERS, "bytes", ByteTokenizer)
    return ByteTokenizer()


def corpus_config(source: str, *mirrors: str, **changes: Any) -> CorpusConfig:
    values = {"source": source, "mirrors": list(mirrors), "sha256": None, "column": None, "tokenizer": "gpt2"}
    return CorpusConfig(**values | {"fraction": 1.0, "val_fraction": 0.0} | changes)


@pytest.fixture(name="project")
def _project(tmp_path: Path, bpe: Path) -> Path:
    """A workspace of the stage `tokenize`, with three documents of 45 kB each."""
    rng = np.random.default_rng(1)
    lines = "".join(f"{number} {chr(97 + number % 26) * 3}\n" for number in rng.integers(10**9, size=3_000).tolist())
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(name + lines)
    corpus = corpus_config("texts", val_fraction=0.1)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"corpus": corpus.model_dump()}))
    shutil.copytree(bpe, tmp_path / "data" / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        fetch_corpus(corpus, Path("data/corpus.txt"))
    return tmp_path
