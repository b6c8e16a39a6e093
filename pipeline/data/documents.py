"""Read the documents of text and JSONL files, plain or compressed, as normalised UTF-8 in chunks."""

import codecs
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pipeline.system.errors import InputError, IntegrityError

CHUNK_BYTES = 1 << 18
MAX_LINE_BYTES = 1 << 26  # of JSONL: a whole record is held in memory
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": lambda *arguments: zstd().open(*arguments)}
HINT = "save it as UTF-8 text"


def zstd() -> Any:
    """Import the standard library's zstd, or its backport before Python 3.14, only when a text is read."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def find_files(source: str) -> list[Path]:
    """List the files of a path, of a folder and its subfolders, or of a glob, sorted by path.

    Hidden files and the README.md of the top folder are ignored. Raises InputError if no file is found.
    """
    path, (root, *parts) = Path(source), PurePosixPath(source).parts
    if not path.is_dir() and (path.exists() or not set(source) & set("*?[")):
        return [path]
    if any("**" in part and part != "**" for part in parts):
        raise InputError(f"{source}: ** must be a whole part, as in {root}/**/*.txt: fix corpus.source")
    found = _matching(path, ["**"]) if path.is_dir() else _matching(Path(root), parts)
    files = sorted({file for file in found if file != Path(root, "README.md")})
    if not files:
        what = "contains no texts" if path.is_dir() else "matches no file"
        raise InputError(f"{source} {what}: add texts or set another corpus.source")
    return files


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the visible files below `folder` that a glob's `parts` match, also twice; `**` matches any folders.

    It replaces `Path.glob`, in which `**` has another meaning from Python 3.13 on.
    """
    part, *others = parts
    if part == "**" and others:
        yield from _matching(folder, others)
    for path in folder.iterdir():
        if path.name.startswith(".") or not fnmatchcase(path.name, part):
            continue
        if path.is_dir() and (below := parts if part == "**" else others):
            yield from _matching(path, below)
        elif path.is_file() and not others:
            yield path


def read_documents(path: Path, name: str, changes: Counter[str]) -> Iterator[bytes]:
    """Yield the text of the file `path` in chunks; an empty chunk ends a document.

    A text file is one document; each line of a JSONL file is one. The suffix of `name`, which may be a URL, decides:
    `.jsonl` or text, then `.gz` or `.zst` if it is compressed. In text, a byte order mark is removed and CRLF becomes
    LF; both are counted in `changes`. Raises InputError, with the position, if the text is not UTF-8, contains a NUL or
    is not JSONL, IntegrityError if compressed data is truncated or corrupt.
    """
    suffixes = PurePosixPath(urlsplit(name).path if name.startswith("http") else name).suffixes
    compression = suffixes.pop().lower() if suffixes and suffixes[-1].lower() in OPENERS else ""
    read = _records if suffixes and suffixes[-1].lower() == ".jsonl" else _text
    try:
        with OPENERS.get(compression, open)(path, "rb") as file:
            yield from read(file, name, changes)
    except (gzip.BadGzipFile, zlib.error, zstd().ZstdError, EOFError) as error:
        raise IntegrityError(f"{name} is truncated or corrupt ({error}): download or compress it again") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check corpus.source") from None


def _text(file: BinaryIO, name: str, changes: Counter[str]) -> Iterator[bytes]:
    """Yield the chunks of a text file, which is one document."""
    decoder, offset, chunk = codecs.getincrementaldecoder("utf-8")(), 0, b"\0"
    while chunk:
        chunk = file.read(CHUNK_BYTES)
        while chunk.endswith(b"\r") and (following := file.read(1)):  # do not split a CRLF
            chunk += following
        n_pending = len(decoder.getstate()[0])  # bytes of a character that began in the previous chunk
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset - n_pending + error.start}: {HINT}") from None
        if "\0" in text:
            raise InputError(f"{name} contains a NUL at byte {offset + chunk.index(0)}: {HINT}")
        clean = chunk
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            clean = chunk.removeprefix(codecs.BOM_UTF8)
            changes["byte order marks removed"] += 1
        if clean := _with_lf(clean, changes):
            yield clean
        offset += len(chunk)
    yield b""


def _records(file: BinaryIO, name: str, changes: Counter[str]) -> Iterator[bytes]:
    """Yield a document and its end for each line of JSONL that is not blank."""
    offset = 0
    for number, raw in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
        where = f"{name} line {number}"
        if len(raw) > MAX_LINE_BYTES:
            raise InputError(f"{where} has more than {MAX_LINE_BYTES:,} bytes: save this text in its own file")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset + error.start}: {HINT}") from None
        offset += len(raw)
        if (line := line.removeprefix("\ufeff")).strip():
            if document := _with_lf(_record(line, where), changes):
                yield document
            yield b""


def _record(line: str, where: str) -> bytes:
    """Parse one record and return its text in UTF-8."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON: write one record per line") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no text: a record is {{"text": "..."}}')
    if "\0" in text:
        raise InputError(f"{where} contains a NUL: remove it")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} contains a lone surrogate, which is not a character: remove it") from None


def _with_lf(text: bytes, changes: Counter[str]) -> bytes:
    if n := text.count(b"\r\n"):
        changes["CRLF replaced by LF"] += n
    return text.replace(b"\r\n", b"\n")
