"""Write files and folders atomically, with SHA-256 manifests and locks."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.system.errors import DISK_FULL, InputError, IntegrityError, OutOfSpaceError, RunLocked

MANIFEST = "manifest.json"
HINT = "run `chmod -R u+w .dvc/cache`, so that DVC verifies its copy, then `dvc repro -f` with the stage that makes it"
UNFINISHED = ".unfinished-"  # prefix of files and folders while they are written; the next writer removes leftovers


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to. It replaces `path` if the block succeeds, and is removed if it fails.

    Raises OutOfSpaceError if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{UNFINISHED}{path.name}"
    try:
        with report_full_disk(path.parent):
            yield unfinished
            fsync(unfinished)
            os.replace(unfinished, path)
            fsync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, needed_bytes: int | None = None, manifest: bool = True) -> Iterator[Path]:
    """Yield a folder to fill. It replaces `folder` if the block succeeds, and is removed if it fails.

    With `manifest`, a manifest is added; the folder must not have subfolders. Every file is flushed to the disk before
    the rename, and the rename before the return. An existing folder is replaced only when the new one is complete.
    Raises OutOfSpaceError if the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f"{UNFINISHED}{folder.name}"
    try:
        with report_full_disk(folder.parent, needed_bytes):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            put_in_place(unfinished, folder, manifest)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def put_in_place(finished: Path, folder: Path, manifest: bool = True) -> None:
    """Replace `folder` by a complete folder, as `atomic_folder` does at its end."""
    replaced = folder.parent / f"{UNFINISHED}replaced-{folder.name}"
    try:
        if manifest:
            write_manifest(finished)
        for path in (*sorted(finished.rglob("*")), finished):
            fsync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
        os.rename(finished, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def sweep_unfinished(folder: Path, name: str = "") -> None:
    """Remove the unfinished files of a killed writer from `folder`: those whose names begin with `name`."""
    for leftover in folder.glob(f"{UNFINISHED}{name}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextmanager
def report_full_disk(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Raise OutOfSpaceError, with the bytes needed and free, if the system reports a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(folder).free
        needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
        raise OutOfSpaceError(
            f"disk full in {folder}: {needed}{free:,} bytes free, make room and run the same command again"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, hint: str = "run `dvc repro`, which makes it") -> Any:
    """Read a JSON file. Raises InputError if it is missing, IntegrityError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} not found: {hint}") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON ({error}): {hint}") from None


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of each file in `folder` to its manifest.json."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest = {path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def verify_manifest(folder: Path, hint: str = HINT) -> None:
    """Raise IntegrityError, with the file's name, unless `folder` has exactly the files of its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise IntegrityError(f"{folder / MANIFEST} is missing: {hint}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IntegrityError(f"{folder / MANIFEST} is not a manifest: {hint}") from None
    present = {path.name for path in folder.iterdir()}
    if surplus := present - {*expected, MANIFEST}:
        raise IntegrityError(f"{folder / min(surplus)} is not in its manifest: {hint}")
    for name, (size_bytes, _) in expected.items():
        path = folder / name
        if name not in present or not path.is_file():  # not a file of this folder, such as ../x
            raise IntegrityError(f"{path} is missing: {hint}")
        if path.stat().st_size != size_bytes:
            raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected {size_bytes}: {hint}")
    with ThreadPoolExecutor() as pool:  # there may be thousands of files, and hashing releases the GIL
        hashes = pool.map(sha256_file, (folder / name for name in expected))
        for (name, (_, digest)), found in zip(expected.items(), hashes, strict=True):
            if found != digest:
                raise IntegrityError(f"{folder / name} is altered (SHA-256 {found}, expected {digest}): {hint}")


def flock(file: IO[Any], operation: int) -> None:
    """Call fcntl.flock. Raises BlockingIOError if another process has the lock, InputError if the disk has no locks."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:  # Lustre without the mount option flock, some NFS
        folder, why = Path(file.name).parent, (error.strerror or str(error)).lower()
        raise InputError(f"the disk of {folder} cannot lock files ({why}): move the project to another disk") from None


def lock_holder(file: IO[str]) -> str:
    """The id of the process that has written it into a lock's open file, with its host unless that is this one."""
    pid, _, host = file.read().partition(" ")
    return (pid or "unknown") + (f" on {host}" if host not in ("", socket.gethostname()) else "")


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, X.lock for X; the system releases it when the process ends.

    Without `wait`, raises RunLocked if another process holds the lock, with the process's pid, and its host unless that
    is this one. Raises InputError if the disk does not support locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(
                f"{path.with_suffix('')} is held by process {lock_holder(file)}: wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        yield
