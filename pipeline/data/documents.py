"""Read the documents of text and JSONL files, plain or compressed, as clean UTF-8, chunk by chunk.

A text file is one document, each line of a JSONL file is one. A name's end says which it is: `.jsonl`, else text; after
it `.gz` or `.zst` where it is compressed.
"""

import codecs
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pipeline.system.errors import InputError, IntegrityError

CHUNK_BYTES = 1 << 18
MOST_LINE_BYTES = 1 << 26  # of JSONL: a record is in memory as a whole
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": lambda *arguments: zstd().open(*arguments)}
SAVE = "save it as UTF-8 text"


def zstd() -> Any:
    """The standard library's module, or its backport before Python 3.14; imported only where texts are read."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder (with those below it) or a glob names, sorted by their paths.

    Hidden files and the README.md of the topmost folder are left out. Raises InputError where nothing is left.
    """
    path, root = Path(source), PurePosixPath(source).parts[0]
    if not path.is_dir() and (path.exists() or not set(source) & set("*?[")):
        return [path]
    try:
        found = [*(path.rglob("*") if path.is_dir() else Path().glob(source))]
    except ValueError as error:
        raise InputError(f"{source} is not a glob ({error}): fix corpus.source") from None
    visible = (file for file in found if not any(part.startswith(".") for part in file.parts))
    files = sorted(file for file in visible if file.is_file() and file != Path(root, "README.md"))
    if not files:
        what = "is a folder without texts" if path.is_dir() else "matches no file"
        raise InputError(f"{source} {what}: put them there or choose another corpus.source")
    return files


def read_documents(path: Path, name: str, changes: Counter[str]) -> Iterator[bytes]:
    """Yield the text of the file `path`, known by `name`, in chunks; an empty one ends a document.

    A byte order mark is removed and CRLF becomes LF, counted in `changes`. Raises InputError, with the place, where it
    is no UTF-8, holds a NUL or is no JSONL; IntegrityError where what is compressed is cut off or altered.
    """
    suffixes = PurePosixPath(urlsplit(name).path if name.startswith("http") else name).suffixes
    packing = suffixes.pop().lower() if suffixes and suffixes[-1].lower() in OPENERS else ""
    read = _records if suffixes and suffixes[-1].lower() == ".jsonl" else _text
    try:
        with OPENERS.get(packing, open)(path, "rb") as file:
            yield from read(file, name, changes)
    except (gzip.BadGzipFile, zlib.error, zstd().ZstdError, EOFError) as error:
        raise IntegrityError(f"{name} is cut off or altered ({error}): get or compress it again") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check corpus.source") from None


def _text(file: BinaryIO, name: str, changes: Counter[str]) -> Iterator[bytes]:
    """Yield the chunks of one document."""
    decoder, offset, chunk = codecs.getincrementaldecoder("utf-8")(), 0, b"\0"
    while chunk:
        chunk = file.read(CHUNK_BYTES)
        while chunk.endswith(b"\r") and (following := file.read(1)):  # a CRLF lies in one chunk
            chunk += following
        begun = len(decoder.getstate()[0])  # bytes of a character that the chunk before began
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset - begun + error.start}: {SAVE}") from None
        if "\0" in text:
            raise InputError(f"{name} holds a NUL at byte {offset + chunk.index(0)}: {SAVE}")
        clean = chunk
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            clean = chunk.removeprefix(codecs.BOM_UTF8)
            changes["byte order marks removed"] += 1
        if clean := _with_lf(clean, changes):
            yield clean
        offset += len(chunk)
    yield b""


def _records(file: BinaryIO, name: str, changes: Counter[str]) -> Iterator[bytes]:
    """Yield a document, and its end, for each line that is not blank."""
    offset = 0
    for number, raw in enumerate(iter(partial(file.readline, MOST_LINE_BYTES + 1), b""), start=1):
        where = f"{name} line {number}"
        if len(raw) > MOST_LINE_BYTES:
            raise InputError(f"{where} has more than {MOST_LINE_BYTES:,} bytes: make such a text a file of its own")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset + error.start}: {SAVE}") from None
        offset += len(raw)
        if (line := line.removeprefix("\ufeff")).strip():
            if document := _with_lf(_record(line, where), changes):
                yield document
            yield b""


def _record(line: str, where: str) -> bytes:
    """The text of one record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON: write one record a line") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no text: a record reads {{"text": "..."}}')
    if "\0" in text:
        raise InputError(f"{where} holds a NUL: take it out")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a surrogate pair, which is no character: take it out") from None


def _with_lf(text: bytes, changes: Counter[str]) -> bytes:
    if n := text.count(b"\r\n"):
        changes["CRLF made LF"] += n
    return text.replace(b"\r\n", b"\n")
