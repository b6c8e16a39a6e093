"""Find the text and the published weights that a command names, and bring them into texts/ and weights/."""

import filecmp
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product, starmap
from pathlib import Path
from types import MappingProxyType

from pipeline.config.sections import INIT, TEXTS, WEIGHTS_FOLDER
from pipeline.config.text_name import SUFFIX, text_name
from pipeline.data.documents import files_below, find_files
from pipeline.model.published_files import Published, files_in, files_of, find_published, read_published
from pipeline.system.errors import InputError
from pipeline.system.files import atomic_file, sha256_file

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # a URL, or wheel:
WILDCARDS = set("*?[")
NAME = re.compile(r"[\w-][\w.-]*")  # of a model, and of a file
KINDS = "a file, a folder, a glob in quotes, or a URL"


@dataclass(frozen=True)
class Source:
    """A text: the value of corpus.source, the name of its model, and where its files are."""

    source: str
    name: str
    origin: str  # path or URL of the text; a path inside of the project is relative
    files: Mapping[str, Path] = field(default_factory=dict)  # name for messages -> file; empty for a remote source
    copies: Mapping[Path, Path] = field(default_factory=dict)  # file in texts/ -> its original outside of the project


def find_source(given: str, name: str | None) -> Source:
    """Find the files that `given` names, a path or a URL; nothing is written.

    A text outside of texts/ gets a place there, under its model's name. Raises InputError if there is no such text.
    """
    if name is not None and not NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: use letters, digits, `.`, `_` and `-` only")
    if not given.strip():
        raise InputError(f"SOURCE is empty: give {KINDS}")
    typed = Path(os.path.normpath(os.path.expanduser(given)))
    if REMOTE.match(given) and not os.path.exists(typed):  # a file's name may have a colon
        return Source(given, name or name_of(given), given)
    path = Path(os.path.abspath(typed))  # not resolved: a link to a text keeps its own name
    if (below := _below(TEXTS, path)) is not None:
        source = (TEXTS / below).as_posix()
        return Source(source, name or name_of(source), source, {str(file): file for file in find_files(source)})
    if path.exists():
        inside, pattern = path.resolve(), ""
        if any(each.is_relative_to(inside) for each in (Path.cwd(), Path(TEXTS).resolve())):
            # each call would bring the copies of the last one into texts/
            raise InputError(f"{given} contains this project or its {TEXTS}/: give {KINDS} of a text")
    elif WILDCARDS & set(str(typed)):  # not those in the working directory's path
        fixed = next(folder for folder in typed.parents if not WILDCARDS & set(str(folder)))
        inside, pattern = fixed.resolve(), typed.relative_to(fixed).as_posix()
    else:
        raise InputError(f"{given} not found: give {KINDS}")
    files = files_below(inside, pattern, given)
    if pattern and not (files := [file for file in files if _below(TEXTS, file) is None]):  # no copies of earlier calls
        raise InputError(f"{given} matches no file outside of this project's {TEXTS}/: give {KINDS}")
    name = name or name_of(str(typed))
    origin = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)  # the project may be moved
    if path.is_file():
        target = f"{TEXTS}/{name}{path.name.removeprefix(SUFFIX.sub('', path.name))}"
        return Source(target, name, origin, {given: files[0]}, {Path(target): files[0]})
    copies = {Path(TEXTS, name, file.relative_to(inside)): file for file in files}
    return Source(f"{TEXTS}/{name}", name, origin, {str(file): file for file in files}, copies)


def _below(folder: str | Path, path: Path) -> Path | None:
    """The part of an absolute path below a folder of the project, by any spelling; None if it is not below it.

    The folder may be a link.
    """
    root = Path(folder).absolute()
    pairs = product((path, path.parent.resolve() / path.name), (root, root.resolve()))
    return next((each.relative_to(other) for each, other in pairs if each.is_relative_to(other)), None)


def name_of(given: str) -> str:
    """The name for a model of the text `given`: of a local one its last part, or the working directory for *.md.

    So a local text has the same name by an absolute and by a relative path.
    """
    if os.path.lexists(given) or not REMOTE.match(given):
        path = Path(os.path.abspath(given))
        parts = (part for part in (path, *path.parents) if part.exists() or not WILDCARDS & set(part.name))
        given = re.sub(r"[*?[:]", " ", next(parts).name)  # which text_name would take for a glob or a URL
    return re.sub(r"[^\w.-]+", "-", text_name(given)).strip("-.") or "text"


def require_room(source: Source, copied: Mapping[str, str]) -> None:
    """Raise InputError if bringing the text into texts/ would replace a file that is not a copy of the same text.

    `copied`: the copies that an earlier call has made -> SHA-256. If nobody has changed such a copy since, the text has
    changed, and the copy is replaced.
    """

    def is_copy(path: Path) -> bool:
        known = copied.get(path.as_posix())
        return known is not None and (path.is_symlink() or (path.is_file() and known == sha256_file(path)))

    for path, original in source.copies.items():
        if os.path.lexists(path) and not (same(path, original) or is_copy(path)):
            raise InputError(
                f"{path} is another text than {original}: choose another --name, which also names the copy"
            )
    for path in _surplus(source):
        if not is_copy(path):
            raise InputError(
                f"{path} is not in the text {source.name}: choose another --name, which also names the copy"
            )


def _surplus(source: Source) -> list[Path]:
    """Files in the folder of the copies that the text does not have, without hidden files, which are never read."""
    folder = Path(source.source)
    found = sorted(folder.rglob("*")) if source.copies and folder.is_dir() else []
    return [
        path
        for path in found
        if not (path.is_dir() or path in source.copies)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def is_copied(source: Source) -> bool:
    """Whether the text has copies, and texts/ has them all as they are now, and no other file in their place."""
    return bool(source.copies) and all(starmap(same, source.copies.items())) and not _surplus(source)


def same(path: Path, original: Path) -> bool:
    """Whether `path` exists and has the bytes of `original`."""
    return path.exists() and (path.samefile(original) or filecmp.cmp(path, original, shallow=False))


def _is_original(path: Path, original: Path) -> bool:
    """Whether `original` is a link to `path`, which must not be replaced."""
    return path.exists() and not path.is_symlink() and path.samefile(original)


def bring(source: Source, in_place: bool, copied: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Copy the text into texts/, or make links to it (`in_place`); return each copy's SHA-256 by its name.

    The originals are not changed. Copies of files that the text no longer has are removed. `copied`, and what is
    raised: as in `require_room`, which is called again because files may have been added since the plan was made.
    """
    require_room(source, copied)
    for path in _surplus(source):
        path.unlink()
    _bring(source.copies, in_place)
    copies = [path for path, original in source.copies.items() if not _is_original(path, original)]
    return {path.as_posix(): sha256_file(path) for path in copies}


def _bring(copies: Mapping[Path, Path], in_place: bool) -> None:
    for path, original in copies.items():
        if _is_original(path, original) or (path.is_symlink() == in_place and same(path, original)):
            continue
        with atomic_file(path) as unfinished:
            unfinished.unlink(missing_ok=True)
            if in_place:
                unfinished.symlink_to(original)
            else:
                shutil.copyfile(original, unfinished)


@dataclass(frozen=True)
class Weights:
    """Published weights: the value of model.init, the model, and where its files are copied."""

    init: str
    published: Published
    copies: Mapping[Path, Path] = field(default_factory=dict)  # file in weights/ -> its original outside of the project


def find_weights(given: str) -> Weights:
    """Find the published weights that `--init` names, a folder or a model on the Hub; nothing is written.

    A folder outside of weights/ gets a place there. Raises InputError if there is no such model, if it is not a GPT-2,
    or if the place has other weights.
    """
    if (hub := INIT.fullmatch(given)) and hub["repo"]:
        return Weights(given, find_published(given))
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if not given.strip() or not path.is_dir():
        why = "is a file" if given.strip() and path.is_file() else "not found"
        raise InputError(f"--init {given} {why}: give the folder of a GPT-2, or hf://OWNER/NAME such as hf://gpt2")
    if (below := _below(WEIGHTS_FOLDER, path)) is not None and below != Path():
        init = (WEIGHTS_FOLDER / below).as_posix()
        return Weights(init, read_published(path, init))
    published = read_published(path, given)
    place = Path(WEIGHTS_FOLDER, re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "model")
    copies = {place / file.name: file for file in files_of(published)}
    for file in files_in(place):
        if file not in copies or not same(file, copies[file]):
            raise InputError(
                f"{file} is of other weights than {given}: rename the folder that you give, or use {place} by "
                f"--init {place}"
            )
    return Weights(place.as_posix(), published, copies)


def bring_weights(weights: Weights, in_place: bool) -> None:
    """Copy the files of the weights into weights/, or make links to them (`in_place`)."""
    _bring(weights.copies, in_place)
