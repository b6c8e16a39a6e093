"""tokens: text -> a folder of token files -> memory-mapped ids.

The folder holds the parts `train` and `val`, each in shards `train-00000.bin`, ..., and a manifest of their hashes. A
shard is a header and then its ids as little-endian uint16.
"""

import codecs
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, IntegrityError
from pipeline.files import MANIFEST, atomic_folder, sha256_file, verify_manifest
from pipeline.tokenizer import Tokenizer

SHARD_TOKENS = 50_000_000
HEADER = struct.Struct("<8sHHIQ")  # magic, format, dtype, vocab_size, number of ids
MAGIC, FORMAT, UINT16 = b"GPT2TOKS", 1, 16
CHUNK_BYTES = 1 << 20
BLOCK_TOKENS = 1 << 22  # ids looked at together in a pass over a shard

CURE = "make it again with `dvc repro -f tokenize`"

Ids = npt.NDArray[np.uint16]


def write_tokens(
    corpus: Path,
    tokenizer: Tokenizer,
    folder: Path,
    fraction: float = 1.0,
    val_fraction: float = 0.0,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Encode the first `fraction` of the corpus's bytes, the last `val_fraction` of that as part `val`, into `folder`.

    Both shares end with a whole line; each part is encoded as one text, in constant memory. Raises InputError where
    nothing is left for `train`.
    """
    with corpus.open("rb") as file, atomic_folder(folder) as unfinished:
        stop = _line_end(file, corpus.stat().st_size, fraction)
        split = _line_end(file, stop, 1 - val_fraction)
        if split == 0:
            raise InputError(
                f"no whole line of {corpus} is left to train on: raise corpus.fraction or lower val_fraction"
            )
        for part, start, end in (("train", 0, split), ("val", split, stop)):
            ids = tokenizer.encode_chunks(_text(file, start, end))
            write_part(unfinished, part, ids, tokenizer.n_vocab, shard_tokens)


def write_part(
    folder: Path, part: str, batches: Iterable[list[int]], vocab_size: int, shard_tokens: int = SHARD_TOKENS
) -> None:
    """Write the ids as shards of one part, at least one shard. Raises ValueError on an id outside of the vocabulary."""
    pending, written = array("H"), 0  # unlike numpy, array does not wrap an id that is too large for it
    for ids in batches:
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(f"ids range from {min(ids)} to {max(ids)}, but vocab_size is {vocab_size}")
        pending.extend(ids)
        while len(pending) > shard_tokens:
            _write_shard(_shard(folder, part, written), pending[:shard_tokens], vocab_size)
            del pending[:shard_tokens]
            written += 1
    _write_shard(_shard(folder, part, written), pending, vocab_size)


class Tokens:
    """The ids of one part, read-only and on disk until they are looked at."""

    def __init__(self, name: str, shards: list[Ids], vocab_size: int) -> None:
        self.name, self.vocab_size = name, vocab_size
        starts = np.cumsum([0, *map(len, shards)]).tolist()
        self._shards = list(zip(starts, shards, strict=False))
        self._length: int = starts[-1]

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> Ids:
        """Ids `start` up to `stop`: a view within one shard, else a copy. Raises IndexError outside of the part."""
        if not 0 <= start <= stop <= self._length:
            raise IndexError(f"{self.name} has {self._length} tokens, asked for {start} to {stop}")
        overlaps = ((begin, ids) for begin, ids in self._shards if begin < stop and start < begin + len(ids))
        views = [ids[max(start - begin, 0) : stop - begin] for begin, ids in overlaps]
        return views[0] if len(views) == 1 else np.concatenate([np.empty(0, np.uint16), *views])

    def counts(self) -> npt.NDArray[np.int64]:
        """How often each id occurs, (vocab_size,)."""
        counts = np.zeros(self.vocab_size, np.int64)
        for start in range(0, self._length, BLOCK_TOKENS):
            counts += np.bincount(self.read(start, min(start + BLOCK_TOKENS, self._length)), minlength=self.vocab_size)
        return counts

    def require(self, needed: int) -> None:
        """Raise InputError unless there are at least `needed` tokens."""
        if self._length < needed:
            raise InputError(
                f"{self.name} has {self._length} tokens, needs {needed}: take more text or shorter windows"
            )


def open_tokens(folder: Path, part: str) -> Tokens:
    """Map one part's ids into memory, after the folder's manifest, the part's headers and every id were checked.

    Raises InputError where there is no such folder, IntegrityError where a file is not what it should be.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} not found: run `dvc repro tokenize`, which makes it")
    verify_manifest(folder)
    paths = sorted(folder.glob(f"{part}-*.bin"))
    if not paths or paths != [_shard(folder, part, index) for index in range(len(paths))]:
        raise IntegrityError(f"{folder} lacks a shard of part {part}: {CURE}")
    vocab_size = _read_header(paths[0])[0]
    return Tokens(f"{folder}/{part}", [_map_shard(path, vocab_size) for path in paths], vocab_size)


def data_sha256(folder: Path) -> str:
    """Hash of the tokens of all parts: that of the manifest, which holds every file's hash."""
    return sha256_file(folder / MANIFEST)


def _shard(folder: Path, part: str, index: int) -> Path:
    return folder / f"{part}-{index:05}.bin"


def _write_shard(path: Path, ids: "array[int]", vocab_size: int) -> None:
    header = HEADER.pack(MAGIC, FORMAT, UINT16, vocab_size, len(ids))
    path.write_bytes(header + np.frombuffer(ids, np.uint16).astype("<u2").tobytes())


def _read_header(path: Path) -> tuple[int, int]:
    """Vocabulary size and number of ids that a shard claims. Raises IntegrityError on another format."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise IntegrityError(f"{path} is no token file: {CURE}")
    _, version, dtype, vocab_size, length = HEADER.unpack(header)
    if (version, dtype) != (FORMAT, UINT16):
        raise IntegrityError(f"{path} has format {version} and dtype {dtype}, expected {FORMAT} and {UINT16}: {CURE}")
    return vocab_size, length


def _map_shard(path: Path, vocab_size: int) -> Ids:
    """Map one shard's ids. Raises IntegrityError unless its header, its size and every id agree."""
    claimed, length = _read_header(path)
    if claimed != vocab_size:
        raise IntegrityError(f"{path} has vocab_size {claimed}, the shards before it {vocab_size}: {CURE}")
    if (size := path.stat().st_size) != HEADER.size + 2 * length:
        raise IntegrityError(f"{path} has {size} bytes, {length} tokens take {HEADER.size + 2 * length}: {CURE}")
    ids: Ids = np.asarray(np.memmap(path, np.uint8, mode="r")[HEADER.size :].view("<u2"))
    for start in range(0, length, BLOCK_TOKENS):
        if (largest := ids[start : start + BLOCK_TOKENS].max()) >= vocab_size:
            raise IntegrityError(f"{path} holds the id {largest}, but vocab_size is {vocab_size}: {CURE}")
    return ids


def _line_end(file: BinaryIO, stop: int, share: float) -> int:
    """The last offset within the first `share` of `stop` bytes at which a line ends; `stop` itself where share is 1."""
    if share == 1:
        return stop
    limit = int(stop * share)
    while limit > 0:
        start = max(limit - CHUNK_BYTES, 0)
        file.seek(start)
        if (found := file.read(limit - start).rfind(b"\n")) >= 0:
            return start + found + 1
        limit = start
    return 0


def _text(file: BinaryIO, start: int, stop: int) -> Iterator[str]:
    """Yield the text between two offsets in chunks."""

    def chunks() -> Iterator[bytes]:
        file.seek(start)
        for begin in range(start, stop, CHUNK_BYTES):
            yield file.read(min(CHUNK_BYTES, stop - begin))

    return codecs.iterdecode(chunks(), "utf-8")
