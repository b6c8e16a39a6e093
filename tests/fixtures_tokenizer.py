"""A workspace of the stage `tokenize`, and a tokenizer that the package does not know."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import yaml

from pipeline.data.corpus import write_documents
from pipeline.data.tokenizer import TOKENIZERS, Tokenizer
from pipeline.system.files import sha256_file


class ByteTokenizer(Tokenizer):
    """Its tokens are the bytes of UTF-8."""

    files = ("bytes.txt",)
    name = "bytes"
    n_vocab, eot = 257, 256
    cut = re.compile(rb"[^\x80-\xbf]")  # before any character

    @classmethod
    def fetch(cls, folder: Path) -> None:
        (folder / "bytes.txt").write_text("a token a byte\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(b"<end>" if i == self.eot else bytes([i]) for i in ids)


@pytest.fixture(name="byte_tokenizer")
def _byte_tokenizer(monkeypatch: pytest.MonkeyPatch) -> ByteTokenizer:
    """The tokenizer, which corpus.tokenizer: bytes now means."""
    monkeypatch.setitem(TOKENIZERS, "bytes", ByteTokenizer)
    return ByteTokenizer()


@pytest.fixture(name="project")
def _project(tmp_path: Path, bpe: Path) -> Path:
    """A workspace with three texts that take a second or two."""
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(1)
    words = "".join(f"{number} {chr(97 + number % 26) * 3}\n" for number in rng.integers(10**9, size=10_000).tolist())
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(name + words * 4)
    section = {
        "source": "texts",
        "sha256": None,
        "mirrors": [],
        "tokenizer": "gpt2",
        "fraction": 1.0,
        "val_fraction": 0.1,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"corpus": section}))
    shutil.copytree(bpe, tmp_path / "data" / "tokenizer")
    members = {path.name: path for path in sorted((tmp_path / "texts").iterdir())}
    write_documents(members, tmp_path / "data" / "corpus.txt", "texts")
    digest = sha256_file(tmp_path / "data" / "corpus.txt")
    (tmp_path / "data" / "corpus.sha256").write_text(f"{digest}  corpus.txt\n")
    return tmp_path
