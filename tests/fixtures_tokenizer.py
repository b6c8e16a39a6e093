"""A tokenizer of each kind, one from outside of the package, and a workspace of the stage `tokenize`."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import yaml

from pipeline.config.sections import CorpusConfig
from pipeline.data.corpus import fetch_corpus
from pipeline.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer, make_tokenizer


class Utf8Tokenizer(Tokenizer):
    """Its tokens are the bytes of UTF-8."""

    files = ("utf8.txt",)
    name = "utf8"
    n_vocab, eot = 257, 256
    cut = re.compile(rb"[^\x80-\xbf]")  # before any character

    @classmethod
    def make(cls, folder: Path, size: int | None, text: Iterable[bytes]) -> None:
        (folder / "utf8.txt").write_text("one token per byte\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(b"<end>" if i == self.eot else bytes([i]) for i in ids)


@pytest.fixture(name="utf8_tokenizer")
def _utf8_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Utf8Tokenizer:
    """A tokenizer with the name `utf8` in TOKENIZERS."""
    monkeypatch.setitem(TOKENIZERS, "utf8", Utf8Tokenizer)
    return Utf8Tokenizer()


# Scripts whose characters have one to four bytes, in words that occur twice, so that bytes and characters are merged.
POEM = """Wer reitet so spät durch Nacht und Wind?
天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。天地玄黃，宇宙洪荒。
بِسْمِ اللَّهِ الرحمن الرحيم بِسْمِ اللَّهِ
대한민국은 민주공화국이다. 대한민국의 주권은 국민에게 있고 😀👩‍👩‍👧😀
Es ist der Vater mit seinem Kind; der Vater mit seinem Kind.
"""
NAMES = ("gpt2", "bytes", "chars", "bpe:320")


@pytest.fixture(name="made", scope="session")
def _made(bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """A function from a name to a tokenizer, which is trained on POEM and loaded from its files."""
    tokenizers = {"gpt2": load_tokenizer(bpe)}
    for name in NAMES[1:]:
        tokenizers[name] = make_tokenizer(name, tmp_path_factory.mktemp("made") / "tokenizer", [POEM.encode()])
    return tokenizers.__getitem__


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
