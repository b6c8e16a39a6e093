"""Encode the corpus into token files, in shards, on all cores, resuming after the last finished shard."""

import mmap
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from re import Pattern
from typing import NamedTuple

from pipeline.data.token_files import FORMAT, TOKENIZER, Ids, shard_name, write_shard
from pipeline.data.tokenizer import CHARACTER, CUT, Tokenizer
from pipeline.system.errors import InputError, RunLocked
from pipeline.system.files import (
    UNFINISHED,
    atomic_file,
    locked,
    put_in_place,
    read_json,
    report_full_disk,
    sha256_file,
    sha256_json,
    write_json,
)
from pipeline.system.limits import cores
from pipeline.system.progress import Bar

SHARD_BYTES = 1 << 26  # of text per shard
BLOCK_BYTES = 1 << 20  # of text per call of the tokenizer; limits the memory
TRAINING_BYTES = 1 << 16  # of text at once, when a tokenizer is trained
LONG_WORD_BYTES = 50  # a part of the text may end in a longer word
MAX_TRAINING_BYTES = TRAINING_BYTES + (1 << 12)  # at once, where no cut is near


class Shard(NamedTuple):
    """A token file and the bytes of the corpus that it encodes."""

    name: str
    start: int
    stop: int


class Task(NamedTuple):
    """Every `of`-th shard, starting with shard `first`."""

    first: int = 0
    of: int = 1


def write_tokens(
    corpus: Path,
    tokenizer: Tokenizer,
    folder: Path,
    fraction: float = 1.0,
    val_fraction: float = 0.0,
    task: Task | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
) -> Path:
    """Encode the first `fraction` of the corpus's bytes, the last `val_fraction` of that as part `val`, into `folder`.

    Both parts end with a whole line or document, with a word where a line is long, or with a character where a word is
    long. Shards are written into a working folder beside `folder`, whose name is a hash of all inputs that determine
    their bytes. A `task` writes its shards there and returns the working folder. Without a `task`, the missing shards
    are written and the working folder becomes `folder`; other working folders are removed, unless a task is writing
    there. Raises InputError if `train` would be empty.
    """
    planned = _plan(corpus, tokenizer.cut, fraction, val_fraction, shard_bytes)
    key = [sha256_file(corpus), tokenizer.key, planned, BLOCK_BYTES, FORMAT]
    working = folder.parent / f"{UNFINISHED}{folder.name}-{sha256_json(key)[:16]}"
    (working / "tokens").mkdir(parents=True, exist_ok=True)
    workers = workers or cores()
    first, of = task or Task()
    shards = planned[first::of]
    size_bytes = sum(shard.stop - shard.start for shard in shards)
    with Bar(total=size_bytes, desc=str(folder), unit="B", unit_scale=True) as bar:
        for shard in shards:
            with locked(working / f"{shard.name}.lock", wait=True):
                _encode_shard(corpus, shard, tokenizer, working, workers)
            bar.update(shard.stop - shard.start)
    if task:
        return working
    write_json(working / "tokens" / TOKENIZER, tokenizer.key)  # by one process: tasks may write at the same time
    with report_full_disk(folder.parent):
        put_in_place(working / "tokens", folder)
    for leftover in folder.parent.glob(f"{UNFINISHED}{folder.name}-*"):  # also of earlier corpora
        if not _in_use(leftover):
            shutil.rmtree(leftover)
    return folder


def _in_use(working: Path) -> bool:
    """Whether a task is writing a shard there."""
    try:
        for lock in working.glob("*.lock"):
            with locked(lock):
                pass
    except RunLocked:
        return True
    return False


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield text


def _plan(corpus: Path, cut: Pattern[bytes], fraction: float, val_fraction: float, shard_bytes: int) -> list[Shard]:
    """Divide the corpus into shards. Raises InputError if `train` would be empty."""
    with _mapped(corpus) as text:
        split, stop = _parts(corpus, text, fraction, val_fraction)
        return [
            Shard(shard_name(part, index), *span)
            for part, start, end in (("train", 0, split), ("val", split, stop))
            for index, span in enumerate(spans(text, start, end, shard_bytes, cut))
        ]


def training_text(corpus: Path, fraction: float, val_fraction: float) -> Iterator[bytes]:
    """Yield the text of the part `train` in `training_blocks`. Raises InputError if it would be empty."""
    with _mapped(corpus) as text:
        split, _ = _parts(corpus, text, fraction, val_fraction)
        yield from training_blocks(text, split)


def training_blocks(text: mmap.mmap | bytes, stop: int) -> Iterator[bytes]:
    """Yield the text's first `stop` bytes in blocks of at most about MAX_TRAINING_BYTES.

    They are cut where no tokenizer has a token across the cut, or between any characters in a text without such places.
    """
    for start, stop_of_span in spans(text, 0, stop, TRAINING_BYTES, CUT):
        for begin, end in spans(text, start, stop_of_span, MAX_TRAINING_BYTES, CHARACTER):
            yield text[begin:end]


def _parts(corpus: Path, text: mmap.mmap, fraction: float, val_fraction: float) -> tuple[int, int]:
    """The ends of the parts `train` and `val` in the corpus. Raises InputError if `train` would be empty."""
    stop = _part_end(text, len(text), fraction)
    split = _part_end(text, stop, 1 - val_fraction)
    if split == 0:
        raise InputError(f"{corpus} has no text for training: raise corpus.fraction or lower corpus.val_fraction")
    return split, stop


def _part_end(text: mmap.mmap, stop: int, share: float) -> int:
    """Last end of a line or document within the first `share` of `stop` bytes; `stop` if the share is 1.

    If a long line would make that less than nine tenths of the share, the last space is taken instead; if a long word
    would, the end of the last whole character.
    """
    limit = int(stop * share)
    if limit == stop:
        return stop
    line_end = text.rfind(b"\n", 0, limit) + 1
    end = max(line_end, text.rfind(b"\0", line_end, limit) + 1)
    if end < 0.9 * limit:
        end = max(end, text.rfind(b" ", end, limit))
    if end == 0 or end < 0.9 * limit - LONG_WORD_BYTES:
        end = next(n for n in range(limit, -1, -1) if CHARACTER.match(text, n))
    return end


def spans(text: mmap.mmap | bytes, start: int, stop: int, size: int, cut: Pattern[bytes]) -> Iterator[tuple[int, int]]:
    """Split the text between two offsets at matches of `cut`, about every `size` bytes, into one or more spans."""
    while True:
        found = cut.search(text, start + size, stop)
        end = found.start() if found else stop
        yield start, end
        if end == stop:
            return
        start = end


def _encode_shard(corpus: Path, shard: Shard, tokenizer: Tokenizer, working: Path, workers: int) -> None:
    """Write a shard and then a file with its hash, unless a shard with this hash is already there.

    A shard is a pure function of the corpus: each process, on any machine that shares the disk, writes the same bytes.
    """
    path, digest = working / "tokens" / shard.name, working / f"{shard.name}.json"
    if path.is_file() and digest.is_file() and read_json(digest) == sha256_file(path):
        return

    def batches(text: mmap.mmap, pool: ThreadPoolExecutor) -> Iterator[Ids]:
        """Yield the ids in the order of the text; threads encode the next blocks at the same time."""
        ahead: deque[Future[Ids]] = deque()
        for start, stop in spans(text, shard.start, shard.stop, BLOCK_BYTES, tokenizer.cut):
            ahead.append(pool.submit(tokenizer.encode_documents, text[start:stop]))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        yield from (each.result() for each in ahead)

    with atomic_file(path) as unfinished, _mapped(corpus) as text, ThreadPoolExecutor(workers) as pool:
        write_shard(unfinished, batches(text, pool), tokenizer.n_vocab)
    write_json(digest, sha256_file(path))
