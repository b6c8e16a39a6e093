"""Read the documents of texts and tables, plain or compressed, as normalised UTF-8 in chunks."""

import codecs
import gzip
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pipeline.data.tables import RECORD, Rows, read_csv, read_jsonl, read_parquet, read_tsv
from pipeline.system.errors import InputError, IntegrityError

CHUNK_BYTES = 1 << 18
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": lambda *arguments: _open_zstd(*arguments)}
MAX_WINDOW = 31  # binary logarithm of the most bytes that zstd refers back to, as with `zstd --long=31`
HINT = "save it as UTF-8 text"
TABLES: dict[str, Callable[[BinaryIO, str, str | None], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,  # of JSON, only JSON Lines
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
POINTER = ".dvc"
IS_POINTER = "DVC's pointer to a text: fetch the text with `dvc pull`, and name the text itself"
HEAD_BYTES = 512
MAGIC = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd", ".parquet": rb"PAR1"}
COMMENT = rb"<!--(?:(?!-->).)*-->"  # ends at the first -->, so that HTML matches in one way only and in linear time
HTML = rb"(?i)(\xef\xbb\xbf)?(\s|<\?xml[^>]*>|%b)*<(!doctype html|html|head|script)\b" % COMMENT
MEDIA = "an image, sound or video, not a text: remove it from the texts"
FORMATS = {  # how a file begins -> what it is, and what to do
    MAGIC[".gz"]: "compressed with gzip: save it under a name that ends with .gz",
    MAGIC[".zst"]: "compressed with zstd: save it under a name that ends with .zst",
    rb"BZh\d|\xfd7zXZ\0": "compressed with bzip2 or xz: use gzip or zstd",
    rb"(md5: \w{32}\s+)?(frozen: true\s+deps:\s+- |outs:\s+- (md5|etag|checksum|hash): )": IS_POINTER,
    rb"version https://git-lfs": "a Git LFS pointer: fetch the text with `git lfs pull`",
    rb"/annex/objects/": "a git-annex pointer: fetch the text with `git annex get`",
    rb"PK[\3\5]|.{257}ustar|7z\xbc\xaf|Rar!\x1a": "an archive, as a .docx or .epub is: save its texts as UTF-8",
    rb"%PDF-|%!PS|\{\\rtf|\xd0\xcf\x11\xe0": f"a PDF, PostScript, RTF or Office document: {HINT}",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}(WEBP|WAVE|AVI )|\0.{3}ftyp|II\*\0|MM\0\*|OggS|ID3[\2-\4]": MEDIA,
    rb"(<\?xml.{,99}\?>\s*)?<(!DOCTYPE )?svg": MEDIA,
    MAGIC[".parquet"]: "a Parquet table: save it under a name that ends with .parquet",
    rb"ARROW1|SQLite format 3\0": f"a table or database: write its texts as JSON Lines (.jsonl), where {RECORD}",
    HTML: f"an HTML page: save its text, or the page as a record of JSON Lines (.jsonl), where {RECORD}",
    rb'\s*\{\s*"cells"\s*:\s*\[': "a notebook: save it as text with `jupyter nbconvert --to markdown`",
}
JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"')  # how an object, or an array of objects, begins


def zstd() -> Any:
    """Import the standard library's zstd, or its backport before Python 3.14, only when a text is read."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _open_zstd(path: Path, mode: str) -> Any:
    return zstd().open(path, mode, options={zstd().DecompressionParameter.window_log_max: MAX_WINDOW})


def find_files(source: str, base: Path = Path()) -> list[Path]:
    """List the files of a project's text, sorted by path; `source`: the value of corpus.source, `base`: the project.

    Ignored is the README.md of the top folder, texts/. Raises InputError as `files_below` does, or if a folder is a
    symbolic link.
    """
    root, *parts = PurePosixPath(source).parts
    for n in range(1, len(parts) + 1):  # texts/ itself may be a link, to another disk
        _refuse_link(base.joinpath(root, *parts[:n]))
    return files_below(base / root, "/".join(parts), source, ignored=base / root / "README.md")


def files_below(folder: Path, pattern: str, name: str, ignored: Path | None = None) -> list[Path]:
    """List the files of a path in `folder`, of a folder and its subfolders, or of a glob, sorted by path.

    `pattern` is relative to `folder`, and empty for `folder` itself; messages have `name` instead of both. Ignored are
    hidden files, the file `ignored`, and a .dvc file if its text is in the same folder. Raises InputError if no file is
    found, if a folder below is a symbolic link, or if a name is not UTF-8.
    """
    path, parts = folder / pattern, PurePosixPath(pattern).parts
    if not path.is_dir() and (path.exists() or not set(pattern) & set("*?[")):
        if path.exists() and not path.is_file():
            raise InputError(f"{name} is a pipe or a device, which can be read only once: save the text in a file")
        return [_with_utf8_name(path)]
    if any("**" in part and part != "**" for part in parts):
        raise InputError(f"{name}: ** must be a whole part, as in texts/**/*.txt: fix corpus.source")
    found = _matching(path, ["**"]) if path.is_dir() else _matching(folder, parts)
    files = sorted({file for file in found if file != ignored and not _is_tracked(file)})
    if not files:
        what = "contains no texts" if path.is_dir() else "matches no file"
        raise InputError(f"{name} {what}: add texts or set another corpus.source")
    return [_with_utf8_name(file) for file in files]


def _with_utf8_name(path: Path) -> Path:
    """Raise InputError if the name of a file is not UTF-8, which files about the text could not contain."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file") from None
    return path


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the visible files below `folder` that match a glob's `parts`; some repeatedly.

    `**` matches any number of folders. It replaces `Path.glob`, in which `**` has another meaning from Python 3.13 on.
    """
    part, *others = parts
    if part == "**" and others:
        yield from _matching(folder, others)
    for path in folder.iterdir():
        if path.name.startswith(".") or not fnmatchcase(path.name, part):
            continue
        if path.is_dir():
            if below := parts if part == "**" else others:
                _refuse_link(path)
                yield from _matching(path, below)
        elif not others and (path.is_file() or path.is_symlink()):  # a link to nothing is refused when it is read
            yield path


def _is_tracked(path: Path) -> bool:
    """Whether `path` is what `dvc add` writes beside a text, and that text is there."""
    return path.suffix == POINTER and path.with_suffix("").exists()


def _refuse_link(path: Path) -> None:
    """Raise InputError if `path` is a link to a folder: DVC does not notice changes in the folder."""
    if path.is_symlink() and path.is_dir():
        raise InputError(
            f"{path} is a link to a folder, in which DVC sees no change: copy it, or link its files (cp -rs)"
        )


def read_documents(path: Path, name: str, changes: Counter[str], column: str | None = None) -> Iterator[bytes]:
    """Yield the text of the file `path` in chunks; an empty chunk ends a document.

    A text file is one document; each row of a table is one, of which `column` is read: None means `text`, or the only
    column of texts. The suffix of `name`, which may be a URL, decides: one of TABLES or text, then `.gz` or `.zst` if
    it is compressed. In text, a byte order mark is removed and CRLF becomes LF. `changes` counts both, and the rows of
    each column that is read. Raises InputError if the file is of another format or has no such column, and, with the
    position, if the text is not UTF-8, contains a NUL or a row is not valid; IntegrityError if data is truncated or
    corrupt.
    """
    suffix, compression = _suffixes(name)
    if suffix == POINTER:
        raise InputError(f"{name} is {IS_POINTER}")
    try:
        with path.open("rb") as file:
            _refuse_format(file.read(HEAD_BYTES), name, compression or suffix)
        with OPENERS.get(compression, open)(path, "rb") as file:
            _refuse_format(file.read(HEAD_BYTES), name, suffix)
            file.seek(0)
            if read := TABLES.get(suffix):
                yield from _rows(read(file, name, column), changes)
            else:
                yield from _text(file, name, changes)
    except (gzip.BadGzipFile, zlib.error, zstd().ZstdError, EOFError) as error:
        raise IntegrityError(f"{name} is truncated or corrupt ({error}): download or compress it again") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check corpus.source") from None


def is_table(name: str) -> bool:
    """Whether the file `name` is a table by its suffix."""
    return _suffixes(name)[0] in TABLES


def _suffixes(name: str) -> tuple[str, str]:
    """The suffix of the format of a file, or of a URL, and that of its compression; empty if there is none."""
    suffixes = PurePosixPath(urlsplit(name).path if name.startswith("http") else name).suffixes
    compression = suffixes.pop().lower() if suffixes and suffixes[-1].lower() in OPENERS else ""
    return suffixes[-1].lower() if suffixes else "", compression


def _refuse_format(head: bytes, name: str, suffix: str) -> None:
    """Raise InputError if a file that begins with `head` is in one of FORMATS, other than that of its own `suffix`."""
    for begin, what in FORMATS.items():
        if begin != MAGIC.get(suffix) and re.match(begin, head, re.DOTALL):
            raise InputError(f"{name} is {what}")


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
        if offset == 0 and JSON.match(chunk):
            raise InputError(f"{name} is JSON: save it as JSON Lines (.jsonl), where {RECORD}")
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            clean = chunk.removeprefix(codecs.BOM_UTF8)
            changes["byte order marks removed"] += 1
        if clean := _with_lf(clean, changes):
            yield clean
        offset += len(chunk)
    yield b""


def _rows(rows: Rows, changes: Counter[str]) -> Iterator[bytes]:
    """Yield a document and its end for each row of a table."""
    for where, column, text in rows:
        changes[f"rows of the column {column!r}"] += 1
        if "\0" in text:
            raise InputError(f"{where} contains a NUL: remove it")
        try:
            document = text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} contains a lone surrogate, which is not a character: remove it") from None
        if document := _with_lf(document, changes):
            yield document
        yield b""


def _with_lf(text: bytes, changes: Counter[str]) -> bytes:
    if n := text.count(b"\r\n"):
        changes["CRLF replaced by LF"] += n
    return text.replace(b"\r\n", b"\n")
