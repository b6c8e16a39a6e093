"""A tokenizer that the package does not know: its tokens are the bytes of UTF-8."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pytest

from pipeline.data.tokenizer import TOKENIZERS, Tokenizer


class ByteTokenizer(Tokenizer):
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
