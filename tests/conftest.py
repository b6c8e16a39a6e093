"""What several tests need: the BPE files, the corpus that the published numbers are about, copies of the project."""

import os
import random
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures_mlflow import _no_foreign_store, recorder_threads, store  # noqa: F401 (fixtures for all)
from fixtures_network import close_network, wheels  # noqa: F401 (fixtures for all)
from fixtures_slurm import slurm  # noqa: F401 (a fixture for all)
from fixtures_texts import fetch_texts
from hypothesis import settings

from pipeline.config.params import load_params
from pipeline.config.sections import CorpusConfig
from pipeline.data.corpus import fetch_corpus, verify_corpus
from pipeline.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import locked
from tests.trainings import prepared, straight, workspace  # noqa: F401 (fixtures for all)

ROOT = Path(__file__).parent.parent
settings.register_profile("the same examples each time", derandomize=True, max_examples=20, deadline=None)
settings.load_profile("the same examples each time")
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the `make check` that runs the tests: tests run make themselves
    os.environ.pop(name, None)


LONG_FILES = (
    "test_repro.py",
    "test_sweep_faults.py",
    "test_slurm.py",
    "test_soak.py",
    "test_experiments.py",
    "test_sweep_slurm.py",
    "test_learn.py",
)


@pytest.hookimpl(trylast=True)  # after pytest-randomly
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first: with several processes, one would wait for the others at the end."""
    last = len(LONG_FILES)
    items.sort(key=lambda item: LONG_FILES.index(name) if (name := item.path.name) in LONG_FILES else last)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the chosen tests need and is not there yet; from then on nothing reaches another machine."""
    needed = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    with locked(session.config.cache.mkdir("fetched") / "one.lock", wait=True):  # one of pytest's processes fetches
        if "bpe" in needed:
            fetched_bpe(session.config)
        if "shakespeare" in needed:
            fetched_corpus(session.config)
        if "real_text" in needed:
            fetch_texts(session.config)
    close_network()


def fetched_bpe(config: pytest.Config) -> Path:
    """The checkout's data/tokenizer, or a copy that is fetched once."""
    cached = config.cache.mkdir("bpe")
    for folder in (ROOT / "data" / "tokenizer", cached):
        try:
            if load_tokenizer(folder).name == "gpt2":  # the checkout's model may have another one
                return folder
        except (InputError, IntegrityError):
            continue
    make_tokenizer("gpt2", cached, [])
    return cached


def fetched_corpus(config: pytest.Config) -> Path:
    """Tiny Shakespeare: a copy that is fetched once."""
    path = config.cache.mkdir("corpus") / "corpus.txt"
    try:
        verify_corpus(path)
    except (InputError, IntegrityError):
        fetch_corpus(load_params(ROOT / "params.yaml").section(CorpusConfig), path)
    return path


@pytest.fixture(scope="session")
def bpe(request: pytest.FixtureRequest) -> Path:
    return fetched_bpe(request.config)


@pytest.fixture(scope="session")
def copy_project(wheels: Path) -> Callable[[Path], None]:  # noqa: F811
    """Copies what is in the checkout, committed or not, to a folder, where both download stages find their sources."""

    def copy(folder: Path) -> None:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in filter(None, subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    return copy


@pytest.fixture(scope="session")
def commit_all() -> Callable[[Path], None]:
    """Makes a folder a repository with all of it committed."""

    def commit(folder: Path) -> None:
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
            identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
            subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, timeout=60)

    return commit


@pytest.fixture(scope="session")
def tokenizer(bpe: Path) -> Tokenizer:
    return load_tokenizer(bpe)


@pytest.fixture(scope="session")
def shakespeare(request: pytest.FixtureRequest) -> Path:
    return fetched_corpus(request.config)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal: programs in the background ignore SIGINT, and those under nohup SIGHUP."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def chance() -> random.Random:
    """Chance for moments and orders that nobody chose: another seed in each test and run.

    A failure shows, under "Captured stdout setup", a line `seed 123456: repeat with FAULT_SEED=123456`;
    `FAULT_SEED=123456 pytest tests/test_file.py -k name` then draws the same numbers again.
    """
    seed = int(os.environ.get("FAULT_SEED") or secrets.randbelow(10**6))
    print(f"seed {seed}: repeat with FAULT_SEED={seed}")
    return random.Random(seed)
