"""documents: files of text or JSONL, plain or compressed -> their documents as clean UTF-8, chunk by chunk.

A file of text is one document, a line of JSONL another each. The end of a name says which it is: `.jsonl`, else text;
`.gz` and `.zst` after it, compressed.
"""

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pipeline.system.errors import InputError, IntegrityError

CHUNK_BYTES = 1 << 18
MOST_LINE_BYTES = 1 << 26  # of JSONL: a record is in memory as a whole
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": lambda *arguments: zstd().open(*arguments)}
SAVE = "save it as UTF-8 text"


@dataclass
class Changes:
    """What was normalised so far."""

    marks: int = 0  # byte order marks removed
    crlf: int = 0  # made LF

    def __str__(self) -> str:
        marks = "byte order mark removed" if self.marks == 1 else f"{self.marks:,} byte order marks removed"
        return "; ".join([marks] * (self.marks > 0) + [f"CRLF made LF in {self.crlf:,} places"] * (self.crlf > 0))


def zstd() -> Any:
    """The module of the standard library, or its like for a Python before 3.14: only where texts are read."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder (with those below it) or a glob stands for, sorted by their paths.

    Hidden ones and the README.md of the topmost folder are none. Raises InputError where nothing is left.
    """
    path, root = Path(source), PurePosixPath(source).parts[0]
    if not path.is_dir() and (path.exists() or not set(source) & set("*?[")):
        return [path]
    try:
        found = [*(path.rglob("*") if path.is_dir() else Path().glob(source))]
    except ValueError as error:
        raise InputError(f"{source} is no glob ({error}): mend corpus.source") from None
    visible = (file for file in found if not any(part.startswith(".") for part in file.parts))
    files = sorted(file for file in visible if file.is_file() and file != Path(root, "README.md"))
    if not files:
        what = "is a folder without texts" if path.is_dir() else "matches no file"
        raise InputError(f"{source} {what}: put them there or choose another corpus.source")
    return files


def read_documents(path: Path, name: str, changes: Changes) -> Iterator[bytes]:
    """Yield the text of the file `path`, known by `name`, in chunks; an empty one ends a document.

    A byte order mark is removed and CRLF becomes LF, counted in `changes`. Raises InputError, with the place, where it
    is no UTF-8, holds a NUL or is no JSONL; IntegrityError where what is compressed is cut off or altered.
    """
    suffixes = PurePosixPath(urlsplit(name).path if name.startswith("http") else name).suffixes
    packing = suffixes.pop().lower() if suffixes and suffixes[-1].lower() in OPENERS else ""
    is_jsonl = bool(suffixes) and suffixes[-1].lower() == ".jsonl"
    with _naming(name), OPENERS.get(packing, open)(path, "rb") as file:
        yield from _records(file, name, changes) if is_jsonl else _text(file, name, changes)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn what goes wrong in reading into an error with the file's name."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, zstd().ZstdError, EOFError) as error:
        raise IntegrityError(f"{name} is cut off or altered ({error}): get or compress it again") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check corpus.source") from None


def _text(file: BinaryIO, name: str, changes: Changes) -> Iterator[bytes]:
    """Yield the chunks of one document."""
    held = b""
    for offset, chunk in _utf8_chunks(file, name):
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            changes.marks += 1
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""  # its LF may open the next chunk
        chunk = chunk.removesuffix(held)
        changes.crlf += chunk.count(b"\r\n")
        if chunk:
            yield chunk.replace(b"\r\n", b"\n")
    if held:
        yield held
    yield b""


def _utf8_chunks(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield a file's chunks with their offsets once they are known to be text."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in chain(iter(partial(file.read, CHUNK_BYTES), b""), [b""]):  # the end, too, is decoded
        begun = len(decoder.getstate()[0])  # bytes of a character that the chunk before began
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset - begun + error.start}: {SAVE}") from None
        if "\0" in text:
            raise InputError(f"{name} holds a NUL at byte {offset + chunk.index(0)}: {SAVE}")
        yield offset, chunk
        offset += len(chunk)


def _records(file: BinaryIO, name: str, changes: Changes) -> Iterator[bytes]:
    """Yield a document, and its end, for each line that is not blank."""
    offset = 0
    for number in count(1):
        raw = file.readline(MOST_LINE_BYTES + 1)
        if not raw:
            return
        where = f"{name} line {number}"
        if len(raw) > MOST_LINE_BYTES:
            raise InputError(f"{where} has more than {MOST_LINE_BYTES:,} bytes: make such a text a file of its own")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset + error.start}: {SAVE}") from None
        if offset == 0 and line.startswith("\ufeff"):
            line = line.removeprefix("\ufeff")
            changes.marks += 1
        offset += len(raw)
        if line.strip():
            document = _record(line, where, changes)
            yield from (document, b"") if document else (b"",)


def _record(line: str, where: str, changes: Changes) -> bytes:
    """The text of one record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is no JSON: write one record a line") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no text: a record reads {{"text": "..."}}')
    if "\0" in text:
        raise InputError(f"{where} holds a NUL: take it out")
    changes.crlf += text.count("\r\n")
    try:
        return text.replace("\r\n", "\n").encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a surrogate pair, which is no character: take it out") from None
