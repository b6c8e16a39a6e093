"""Write ids into token files, and read them as memory-mapped arrays.

A folder holds the parts `train` and `val`, each in shards `train-00000.bin`, ..., and a manifest of their hashes. A
shard is a header and then its ids as little-endian uint16.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import MANIFEST, sha256_file, verify_manifest

HEADER = struct.Struct("<8sHHIQ")  # magic, format, dtype, vocab_size, number of ids
MAGIC, FORMAT, UINT16 = b"GPT2TOKS", 1, 16
MOST_IDS = 1 << 16
BLOCK_TOKENS = 1 << 22  # ids counted or checked at once
MOST_MAPPED = 16  # shards at once: each holds a file descriptor, and what was read of it counts as this process's

HINT = "make it again with `dvc repro -f tokenize`"

Ids = npt.NDArray[np.uint16]


def shard_name(part: str, index: int) -> str:
    return f"{part}-{index:05}.bin"


def write_shard(path: Path, batches: Iterable[npt.ArrayLike], vocab_size: int) -> None:
    """Write all ids as one shard. Raises ValueError on an id outside of the vocabulary."""
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


class MappedShard:
    """The ids of one file, mapped into memory when they are read."""

    def __init__(self, path: Path, length: int, ids_of: Callable[[Path], Ids]) -> None:
        self._path, self._length, self._ids_of = path, length, ids_of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> Ids:
        return self._ids_of(self._path)[span]


class Tokens:
    """The ids of one part, read-only and on disk until they are read."""

    def __init__(self, name: str, shards: Sequence[Ids | MappedShard], vocab_size: int) -> None:
        self.name, self.vocab_size, self._shards = name, vocab_size, shards
        self._starts = [0, *accumulate(map(len, shards))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Ids:
        """Ids `start` up to `stop`: a view within one shard, else a copy. Raises IndexError outside of the part."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.name} has {len(self)} tokens, asked for {start} to {stop}")
        which = slice(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop))
        shards = zip(self._starts[which], self._shards[which], strict=False)
        parts = (shard[max(start - begin, 0) : stop - begin] for begin, shard in shards)
        if which.stop - which.start == 1:
            return next(parts)
        return np.concatenate([np.empty(0, np.uint16), *map(np.array, parts)])  # copies: no file stays open

    def counts(self) -> npt.NDArray[np.int64]:
        """How often each id occurs, (vocab_size,)."""
        counts = np.zeros(self.vocab_size, np.int64)
        for shard in self._shards:
            for start in range(0, len(shard), BLOCK_TOKENS):
                counts += np.bincount(shard[start : start + BLOCK_TOKENS], minlength=self.vocab_size)
        return counts

    def require(self, needed: int) -> None:
        """Raise InputError unless there are at least `needed` tokens."""
        if len(self) < needed:
            raise InputError(f"{self.name} has {len(self)} tokens, needs {needed}: take more text or shorter windows")


class TokenFolder:
    """The token files of a text: its parts, each opened when it is asked for, and the hash of all of them."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where there is no such folder, IntegrityError where a file is not as its manifest says."""
        if not folder.is_dir():
            raise InputError(f"{folder} not found: run `dvc repro tokenize`, which makes it")
        verify_manifest(folder)
        self.folder, self.sha256 = folder, data_sha256(folder)

    @cached_property
    def train(self) -> Tokens:
        """What is trained on. Raises IntegrityError unless headers and ids are sound."""
        return self._open("train")

    @cached_property
    def val(self) -> Tokens:
        """What is held out for validation, maybe nothing. Raises IntegrityError unless headers and ids are sound."""
        return self._open("val")

    def _open(self, part: str) -> Tokens:
        folder, paths = self.folder, sorted(self.folder.glob(f"{part}-*.bin"))
        if not paths or paths != [folder / shard_name(part, index) for index in range(len(paths))]:
            raise IntegrityError(f"{folder} lacks a shard of part {part}: {HINT}")
        vocab_sizes, lengths = zip(*map(_check_shard, paths), strict=True)
        if len(set(vocab_sizes)) > 1:
            raise IntegrityError(f"{folder} has shards of several vocabularies, {sorted(set(vocab_sizes))}: {HINT}")
        ids_of = lru_cache(MOST_MAPPED)(_map_shard)
        shards = [MappedShard(path, length, ids_of) for path, length in zip(paths, lengths, strict=True)]
        return Tokens(f"{folder}/{part}", shards, vocab_sizes[0])


def data_sha256(folder: Path) -> str:
    """Hash of the tokens of all parts: that of the manifest, which holds every file's hash."""
    return sha256_file(folder / MANIFEST)


def _check_shard(path: Path) -> tuple[int, int]:
    """Vocabulary size and number of ids of a shard. Raises IntegrityError unless header, size and ids agree."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise IntegrityError(f"{path} is no token file: {HINT}")
    _, version, dtype, vocab_size, length = HEADER.unpack(header)
    size, needed = path.stat().st_size, HEADER.size + 2 * length
    for is_wrong, what in (
        ((version, dtype) != (FORMAT, UINT16), f"format {version} and dtype {dtype}, expected {FORMAT} and {UINT16}"),
        (vocab_size > MOST_IDS, f"vocab_size {vocab_size}, {MOST_IDS} ids fit 16 bits"),  # so many would be counted
        (size != needed, f"{size} bytes, {length} tokens take {needed}"),
    ):
        if is_wrong:
            raise IntegrityError(f"{path} has {what}: {HINT}")
    ids = _map_shard(path)
    for start in range(0, length, BLOCK_TOKENS):
        if (largest := ids[start : start + BLOCK_TOKENS].max()) >= vocab_size:
            raise IntegrityError(f"{path} holds the id {largest}, but vocab_size is {vocab_size}: {HINT}")
    return vocab_size, length


def _map_shard(path: Path) -> Ids:
    ids: Ids = np.asarray(np.memmap(path, np.uint8, mode="r")[HEADER.size :].view("<u2"))
    return ids
