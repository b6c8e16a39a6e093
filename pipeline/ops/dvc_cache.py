"""dvc_cache: DVC's cache -> findings about entries whose bytes are not what their names, MD5 sums, say.

DVC takes what is write-protected for granted, and so checks out an altered entry without a word. With the entry gone it
sees that an output is missing and runs the stage that makes it (tried with DVC 3.67).
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from pipeline.ops.finding import Finding


def examine_cache(root: Path) -> Iterator[Finding]:
    """One finding for each entry that is altered, or one for all of them."""
    cache = cache_of(root)
    entries = sorted(path for path in cache.glob("files/md5/??/*") if path.is_file() and _named_by_md5(path))
    if not entries:
        yield Finding("ok", "DVC cache", f"{cache} holds nothing yet")
        return
    with ThreadPoolExecutor() as pool:  # threads hash them side by side
        sums = list(pool.map(_md5, entries))
    wrong = [path for path, found in zip(entries, sums, strict=True) if found != _md5_of_name(path)]
    if not wrong:
        size = sum(path.stat().st_size for path in entries)
        yield Finding("ok", "DVC cache", f"{len(entries)} files, {size / 1e6:,.0f} MB, each with its own hash")
        return
    outputs = _outputs(root, cache)
    for path in wrong:
        shown = path.relative_to(root) if path.is_relative_to(root) else path
        if place := outputs.get(path.parent.name + path.name):
            what, hint = f"{shown} is altered, a copy of {place}", f"`rm -f {shown}`, then `dvc repro` makes both again"
        else:
            what, hint = (
                f"{shown} is altered; dvc.lock does not name it",
                f"`rm -f {shown}`; `dvc fetch -A` if a remote has it",
            )
        yield Finding("mend", "DVC cache", what, hint)


def cache_of(root: Path) -> Path:
    """The cache's folder, as DVC is configured; its default place where there is no DVC to ask."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 and done.stdout.strip() else root / ".dvc" / "cache"


def _outputs(root: Path, cache: Path) -> dict[str, str]:
    """Which path of the workspace each MD5 of dvc.lock stands for, files in folders included."""
    try:
        stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"].values()
        outs = [out for stage in stages for out in stage.get("outs", [])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return {}
    places: dict[str, str] = {}
    for out in outs:
        places[md5 := str(out.get("md5"))] = str(out["path"])
        if md5.endswith(".dir"):
            places |= {entry["md5"]: f"{out['path']}/{entry['relpath']}" for entry in _listed(cache, md5)}
    return places


def _listed(cache: Path, md5: str) -> list[dict[str, Any]]:
    """What an entry for a folder lists; nothing where it is altered itself."""
    path = cache / "files" / "md5" / md5[:2] / md5[2:]
    if not path.is_file() or _md5(path) != _md5_of_name(path):
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _named_by_md5(path: Path) -> bool:
    """Not so is what DVC is still writing."""
    name = _md5_of_name(path)
    return len(name) == 32 and set(name) <= set("0123456789abcdef")


def _md5_of_name(path: Path) -> str:
    return (path.parent.name + path.name).removesuffix(".dir")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
