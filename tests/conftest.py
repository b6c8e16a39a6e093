"""What several tests need: GPT-2's BPE files, and the corpus that the published numbers are about."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures_mlflow import _no_foreign_store, store  # noqa: F401 (fixtures for all)
from hypothesis import settings

from pipeline.config import load_params
from pipeline.corpus import CorpusConfig, fetch_corpus, verify_corpus
from pipeline.errors import InputError, IntegrityError
from pipeline.tokenizer import Tokenizer, fetch_bpe, load_tokenizer

ROOT = Path(__file__).parent.parent
settings.register_profile("the same examples each time", derandomize=True)
settings.load_profile("the same examples each time")


@pytest.fixture(scope="session")
def bpe(request: pytest.FixtureRequest) -> Path:
    """The checkout's data/bpe, or a copy that is fetched once."""
    cached = request.config.cache.mkdir("bpe")
    for folder in (ROOT / "data" / "bpe", cached):
        try:
            load_tokenizer(folder)
            return folder
        except (InputError, IntegrityError):
            continue
    fetch_bpe(cached)
    return cached


@pytest.fixture(scope="session")
def tokenizer(bpe: Path) -> Tokenizer:
    return load_tokenizer(bpe)


@pytest.fixture(scope="session")
def shakespeare(request: pytest.FixtureRequest) -> Path:
    """Tiny Shakespeare: the copy that is fetched once."""
    path = request.config.cache.mkdir("corpus") / "corpus.txt"
    try:
        verify_corpus(path)
    except (InputError, IntegrityError):
        fetch_corpus(load_params(ROOT / "params.yaml").section(CorpusConfig), path)
    return path


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's programs have it; those started in the background have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
