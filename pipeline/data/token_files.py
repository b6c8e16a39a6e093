"""Write token ids into shards, and read spans of them."""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.tokenizer import MAX_VOCAB, Tokenizer
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import MANIFEST, read_json, sha256_file, verify_manifest

# A shard is this header and the ids as little-endian uint16.
HEADER = struct.Struct("<8sHHIQ")  # magic, format, dtype, vocab_size, number of ids
MAGIC, FORMAT, UINT16 = b"GPT2TOKS", 1, 16
TOKENIZER = "tokenizer.json"  # the key of the tokenizer that made the files; earlier versions lack it
BLOCK_TOKENS = 1 << 22  # ids per read when counting; limits the memory

HINT = "rebuild it with `dvc repro -f tokenize`"

Ids = npt.NDArray[np.uint16]


def shard_name(part: str, index: int) -> str:
    return f"{part}-{index:05}.bin"


def write_shard(path: Path, batches: Iterable[npt.ArrayLike], vocab_size: int) -> None:
    """Write all ids as one shard. Raises ValueError if an id is outside of the vocabulary."""
    length = 0
    with path.open("wb") as file:
        file.seek(HEADER.size)
        for batch in batches:
            ids = np.asarray(batch)
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise ValueError(f"ids range from {ids.min()} to {ids.max()}, but vocab_size is {vocab_size}")
            file.write(ids.astype("<u2").tobytes())
            length += ids.size
        file.seek(0)
        file.write(HEADER.pack(MAGIC, FORMAT, UINT16, vocab_size, length))


class ShardFile:
    """The ids of one shard, read from disk on access."""

    def __init__(self, path: Path) -> None:
        """Raises IntegrityError unless the header is valid and the size agrees with it."""
        with path.open("rb") as file:
            header = file.read(HEADER.size).ljust(HEADER.size, b"\0")
        *kind, self.vocab_size, length = HEADER.unpack(header)
        if kind != [MAGIC, FORMAT, UINT16] or self.vocab_size > MAX_VOCAB:
            raise IntegrityError(f"{path} is not a token file of format {FORMAT}: {HINT}")
        if (size := path.stat().st_size) != HEADER.size + 2 * length:
            raise IntegrityError(f"{path} has {size} bytes, but its header says {length} tokens: {HINT}")
        self._path, self._length = path, int(length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> Ids:
        start, stop, _ = span.indices(self._length)
        return np.fromfile(self._path, "<u2", stop - start, offset=HEADER.size + 2 * start)


class Tokens:
    """The ids of one part, over all its shards, read from disk on access."""

    def __init__(self, name: str, shards: Sequence[Ids | ShardFile], vocab_size: int) -> None:
        self.name, self.vocab_size, self._shards = name, vocab_size, shards
        self._starts = [0, *accumulate(map(len, shards))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Ids:
        """Read the ids from `start` up to `stop`, (N,). Raises IndexError outside of the part."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.name} has {len(self)} tokens, asked for {start} to {stop}")
        which = slice(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop))
        shards = zip(self._starts[which], self._shards[which], strict=False)
        parts = (shard[max(start - begin, 0) : stop - begin] for begin, shard in shards)
        return np.concatenate([np.empty(0, np.uint16), *parts])

    def counts(self) -> npt.NDArray[np.int64]:
        """Count each id, (vocab_size,). Raises IntegrityError if an id is outside of the vocabulary."""
        counts = np.zeros(self.vocab_size, np.int64)
        for shard in self._shards:
            for start in range(0, len(shard), BLOCK_TOKENS):
                found = np.bincount(shard[start : start + BLOCK_TOKENS], minlength=self.vocab_size)
                if (largest := len(found) - 1) >= self.vocab_size:
                    raise IntegrityError(
                        f"{self.name} contains the id {largest}, but vocab_size is {self.vocab_size}: {HINT}"
                    )
                counts += found
        return counts

    def require(self, needed: int) -> None:
        """Raise InputError unless there are at least `needed` tokens."""
        if len(self) < needed:
            raise InputError(
                f"{self.name} has {len(self)} tokens, needs {needed}: use more text or a smaller windows.seq_len"
            )


class TokenFolder:
    """The verified token files of a text: the parts `train` and `val`, which may be empty, and the hash of all files.

    Each part is in shards, `train-00000.bin`, `train-00001.bin`, ...; a manifest contains their hashes, and
    that of a file with the key of their tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InputError if the folder is missing, IntegrityError if a file differs from the manifest."""
        _require_folder(folder)
        verify_manifest(folder)
        self.folder, self.sha256 = folder, data_sha256(folder)
        self.train, self.val = (open_part(folder, part) for part in ("train", "val"))

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise InputError if another tokenizer made the files."""
        path = self.folder / TOKENIZER
        if path.is_file() and (key := read_json(path)) != tokenizer.key:
            raise InputError(
                f"{self.folder} was made by the tokenizer {key}, not by {tokenizer.key}: run `dvc repro tokenize`"
            )


def count_tokens(folder: Path) -> int:
    """The number of tokens of the training text, by the headers of its shards. Raises as TokenFolder."""
    _require_folder(folder)
    return len(open_part(folder, "train"))


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} not found: run `dvc repro tokenize`, which makes it")


def open_part(folder: Path, part: str) -> Tokens:
    """The ids of a part, whose files TokenFolder has verified."""
    shards = [ShardFile(path) for path in sorted(folder.glob(f"{part}-*.bin"))]
    return Tokens(f"{folder}/{part}", shards, max((shard.vocab_size for shard in shards), default=0))


def data_sha256(folder: Path) -> str:
    """SHA-256 of the manifest, which contains the hash of each token file."""
    return sha256_file(folder / MANIFEST)
