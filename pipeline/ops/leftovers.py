"""leftovers: what killed processes left half-written, in the project and in the system's temporary folder -> findings.

Nothing goes that a living process may still be writing. A run's folder says so by its locks, a temporary one by the
process in its name or the locks in it; elsewhere any process of the project counts, and any write of the last minute.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.ops.finding import Finding
from pipeline.registry.artifacts import TEMPORARY
from pipeline.registry.reproduce import git_output
from pipeline.system.files import UNFINISHED
from pipeline.tracking.recorder import RECORDER_LOCK

PACKAGES = ("pipeline", "stages")
WRITTEN_IN = ("data", "models", "reports", "checkpoints", "texts")
GOES_ON = f"{UNFINISHED}tokens-*"  # finished shards, which `tokenize` takes up where it was killed
YOUNG_S = 60


def examine_leftovers(root: Path) -> Iterator[Finding]:
    findings = [*_examine_unfinished(root), *_examine_temporary(root)]
    yield from findings or [Finding("ok", "leftovers", "no killed process left anything half-written")]


def _examine_unfinished(root: Path) -> Iterator[Finding]:
    """What was being written in the project's own folders."""
    places = [root.glob(f"{UNFINISHED}*"), *((root / name).rglob(f"{UNFINISHED}*") for name in WRITTEN_IN)]
    for path in sorted(path for place in places for path in place):
        shown = path.relative_to(root)
        if any(part.startswith(UNFINISHED) for part in shown.parts[:-1]):
            continue  # it goes with what it lies in
        if path.match(GOES_ON):
            what = f"{shown} holds what a stopped tokenize had done: `dvc repro` goes on there"
            yield Finding("note", "leftovers", what)
        elif user := _holder_above(path, root) if "checkpoints" in shown.parts else _writer_in(root) or _writing(path):
            yield Finding("note", "leftovers", f"{shown} is left alone, it may be in use: {user}")
        else:
            yield _removable(path, str(shown), root, [])


def _examine_temporary(root: Path) -> Iterator[Finding]:
    """What was outside of it: copies of versions, and trainings for comparison with their worktrees of this one."""
    worktrees = _worktrees(root)
    own = (path for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*") if path.lstat().st_uid == os.getuid())
    for folder in sorted({*own, *(tree.parent for tree in worktrees)}):
        trees = [tree for tree in worktrees if tree.parent == folder]
        if user := _maker(folder) or next(filter(None, map(lock_holder, folder.rglob("*.lock"))), None):
            yield Finding("ok", "leftovers", f"{folder} is in use: {user}")
        else:
            yield _removable(folder, str(folder), root, trees)


def run_holder(folder: Path) -> str | None:
    """Who trains the run of a folder, or sends its rows, in words; None: nobody."""
    return lock_holder(folder.with_suffix(".lock")) or lock_holder(folder / RECORDER_LOCK)


def lock_holder(lock: Path) -> str | None:
    """Who holds a lock of ours, in words; None: nobody does. Nothing is made or changed."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return f"process {lock.read_text(encoding='utf-8').strip() or 'unknown'}"
    return None


def _removable(path: Path, name: str, root: Path, worktrees: list[Path]) -> Finding:
    def remove() -> str:
        for tree in worktrees:
            git_output(root, "worktree", "remove", "--force", str(tree))
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return f"removed {name}"

    files = [path, *path.rglob("*")]
    size_bytes = sum(file.lstat().st_size for file in files if file.is_file())
    hint = f"`rm -r {name}`{' and `git worktree prune`' if worktrees else ''}"
    return Finding("mend", "leftovers", f"{name}, {size_bytes / 1e6:,.1f} MB, is of a killed process", hint, remove)


def _holder_above(path: Path, root: Path) -> str | None:
    """Who holds the run whose folder the path lies in."""
    above = [folder for folder in path.parents if folder.is_relative_to(root) and folder != root]
    return next(filter(None, map(run_holder, above)), None)


def _writer_in(root: Path) -> str | None:
    """A living process of this project's stages or commands, but for this one."""
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = process.info["cmdline"] or []
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        ours = module.split(".")[0] in PACKAGES and process.info["cwd"] == str(root.resolve())
        if ours and process.pid not in own:
            return f"process {process.pid}, {module}"
    return None


def _writing(path: Path) -> str | None:
    """Whether it was written to of late, by a process that cannot be seen from here."""
    newest = max(file.lstat().st_mtime for file in [path, *path.rglob("*")])
    return f"written less than {YOUNG_S} s ago" if time.time() - newest < YOUNG_S else None


def _maker(folder: Path) -> str | None:
    """The living process that made a temporary folder, which bears its number; another may have it by now."""
    number = folder.name.removeprefix(TEMPORARY).partition("-")[0]
    try:
        if folder.is_dir() and psutil.Process(int(number)).create_time() <= folder.stat().st_mtime:
            return f"process {number}"
    except (ValueError, psutil.Error):
        pass
    return None


def _worktrees(root: Path) -> list[Path]:
    """Worktrees that `models verify --retrain` has checked out, or had when it was killed."""
    listing = (git_output(root, "worktree", "list", "--porcelain") or b"").decode(errors="replace").splitlines()
    paths = [Path(text.removeprefix("worktree ")) for text in listing if text.startswith("worktree ")]
    return [path for path in paths if path.parent.name.startswith(TEMPORARY)]
