"""Encode the corpus into token files: shard by shard, on all cores, resuming after the last finished shard.

The corpus is cut where the tokenizer allows it, so that spans encoded alone give the ids of the whole. A shard is a
pure function of the corpus: any process, on any machine that shares the disk, writes the same bytes.
"""

import mmap
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from re import Pattern
from typing import NamedTuple

from tqdm import tqdm

from pipeline.data.token_files import FORMAT, Ids, shard_name, write_shard
from pipeline.data.tokenizer import Tokenizer
from pipeline.system.errors import InputError
from pipeline.system.files import (
    UNFINISHED,
    atomic_file,
    locked,
    naming_full_disk,
    put_in_place,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)

SHARD_BYTES = 1 << 26  # of text
BLOCK_BYTES = 1 << 20  # of text encoded at once, which keeps the memory small


class Shard(NamedTuple):
    """Which bytes of the corpus make which file."""

    name: str
    start: int
    stop: int


class Task(NamedTuple):
    """Every `of`-th shard, from number `first` on."""

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

    Both shares end with a whole line or document. Shards are written into a folder beside `folder`, whose name depends
    on all that decides their bytes. One of several simultaneous tasks leaves its shards there and returns that folder;
    without a `task`, what is missing is written and all of it moved to `folder`. Raises InputError where nothing is
    left for `train`.
    """
    key = [sha256_file(corpus), tokenizer.name, fraction, val_fraction, shard_bytes, BLOCK_BYTES, FORMAT]
    place = folder.parent / f"{UNFINISHED}{folder.name}-{sha256_json(key)[:16]}"
    (place / "tokens").mkdir(parents=True, exist_ok=True)
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    first, of = task or Task()
    shards = _plan(corpus, tokenizer.cut, fraction, val_fraction, shard_bytes)[first::of]
    size_bytes = sum(shard.stop - shard.start for shard in shards)
    with tqdm(total=size_bytes, desc=f"{folder}", unit="B", unit_scale=True, disable=None) as bar:  # on a terminal
        for shard in shards:
            with locked(place / f"{shard.name}.lock", wait=True):
                _encode_shard(corpus, shard, tokenizer, place, workers)
            bar.update(shard.stop - shard.start)
    if task:
        return place
    with naming_full_disk(folder.parent):
        put_in_place(place / "tokens", folder)
    for leftover in folder.parent.glob(f"{UNFINISHED}{folder.name}-*"):  # of this corpus and of others
        shutil.rmtree(leftover)
    return folder


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield text


def _plan(corpus: Path, cut: Pattern[bytes], fraction: float, val_fraction: float, shard_bytes: int) -> list[Shard]:
    """Which spans of the corpus become shards. Raises InputError where nothing is left for `train`."""
    with _mapped(corpus) as text:
        stop = _line_end(text, len(text), fraction)
        split = _line_end(text, stop, 1 - val_fraction)
        if split == 0:
            raise InputError(
                f"no whole line of {corpus} is left to train on: raise corpus.fraction or lower val_fraction"
            )
        return [
            Shard(shard_name(part, index), *span)
            for part, start, end in (("train", 0, split), ("val", split, stop))
            for index, span in enumerate(spans(text, start, end, shard_bytes, cut))
        ]


def _line_end(text: mmap.mmap, stop: int, share: float) -> int:
    """The last offset within the first `share` of `stop` bytes at which a line or a document ends; `stop` for 1."""
    if share == 1:
        return stop
    limit = int(stop * share)
    line_end = text.rfind(b"\n", 0, limit) + 1
    return max(line_end, text.rfind(b"\0", line_end, limit) + 1)


def spans(text: mmap.mmap | bytes, start: int, stop: int, size: int, cut: Pattern[bytes]) -> Iterator[tuple[int, int]]:
    """Cut the text between two offsets at matches of `cut`, about every `size` bytes; yield one span at least."""
    while True:
        found = cut.search(text, start + size, stop)
        end = found.start() if found else stop
        yield start, end
        if end == stop:
            return
        start = end


def _encode_shard(corpus: Path, shard: Shard, tokenizer: Tokenizer, place: Path, workers: int) -> None:
    """Write a shard, then a note with its hash; a shard that is as its note says is left as it is."""
    path, note = place / "tokens" / shard.name, place / f"{shard.name}.json"
    if path.is_file() and note.is_file() and read_json(note) == sha256_file(path):
        return

    def batches(text: mmap.mmap, pool: ThreadPoolExecutor) -> Iterator[Ids]:
        """Ids in the order of the text, while a few blocks ahead are being encoded."""
        ahead: deque[Future[Ids]] = deque()
        for start, stop in spans(text, shard.start, shard.stop, BLOCK_BYTES, tokenizer.cut):
            ahead.append(pool.submit(tokenizer.encode_documents, text[start:stop]))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        yield from (each.result() for each in ahead)

    with atomic_file(path) as unfinished, _mapped(corpus) as text, ThreadPoolExecutor(workers) as pool:
        write_shard(unfinished, batches(text, pool), tokenizer.n_vocab)
    write_json(note, sha256_file(path))
