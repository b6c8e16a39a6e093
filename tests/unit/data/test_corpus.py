import codecs
import hashlib
import re
import threading
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.sections import CorpusConfig
from pipeline.data import corpus, documents
from pipeline.data.corpus import fetch, fetch_corpus, verify_corpus, write_documents
from pipeline.system.errors import InputError, IntegrityError

TEXT = b"Speak, speak.\n" * 1000
SHA256 = hashlib.sha256(TEXT).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Answers that go wrong, by path; `seen` counts the requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.seen[name] += 1
        if name == "missing":
            return self.send_error(404)
        body = {
            "page": PAGE,
            "page-as-text": PAGE,
            "other": b"another text\n",
            "empty": b"",
        }.get(name, TEXT)
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if name == "page" else "text/plain")
        self.close_connection = True
        if name == "cut-chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1000\r\n" + TEXT[:100])
            return None
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = name in ("cut", "stalled") or (name == "cut-once" and self.server.seen[name] == 1)
        self.wfile.write(body[: len(body) // 2] if half else body)
        if name == "stalled":
            self.wfile.flush()
            self.server.gave_up |= not self.server.over.wait(30)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(corpus, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(corpus, "PAUSE_S", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.over, server.gave_up, server.seen = threading.Event(), False, Counter()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def config_of(source, *mirrors, sha256=SHA256):
    return CorpusConfig(
        source=source, sha256=sha256, mirrors=list(mirrors), tokenizer="gpt2", fraction=1.0, val_fraction=0.0
    )


# B1: download cut short, stalled, 200 with an HTML page, wrong hash

FAULTS = {
    "cut": "broke off after 7,000 of 14,000 bytes",
    "cut-chunked": "broke off after 100 bytes",
    "stalled": "broke off after 7,000 bytes",
    "page": "is an HTML page",
    "page-as-text": "is an HTML page",
}


@pytest.mark.fault
@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("name", FAULTS)
def test_b1_a_bad_download_leaves_no_file_and_says_what_came(server, tmp_path, name, sha256):
    with pytest.raises(IntegrityError, match=FAULTS[name]) as caught:
        fetch_corpus(config_of(server.url + name, sha256=sha256), tmp_path / "corpus.txt")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    assert not server.gave_up  # the client did so first


@pytest.mark.fault
def test_b1_a_wrong_hash_names_the_expected_and_the_found_one(server, tmp_path):
    found = hashlib.sha256(b"another text\n").hexdigest()
    with pytest.raises(IntegrityError, match=f"has SHA-256 {found}, expected {SHA256}"):
        fetch_corpus(config_of(server.url + "other"), tmp_path / "corpus.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
@pytest.mark.parametrize("name", [*FAULTS, "other", "empty", "missing"])
def test_b1_the_next_mirror_is_tried_after_any_fault(server, tmp_path, capsys, name):
    sha256 = None if name == "empty" else SHA256  # without a hash, nothing else would tell
    fetch_corpus(config_of(server.url + name, server.url + "good", sha256=sha256), tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_bytes() == TEXT
    assert re.search(f"skipped: .*{server.url}{name}", capsys.readouterr().out)


@pytest.mark.fault
def test_b1_a_bad_download_keeps_the_file_that_was_there(server, tmp_path):
    (tmp_path / "corpus.txt").write_text("before")
    with pytest.raises(IntegrityError):
        fetch_corpus(config_of(server.url + "cut"), tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_text() == "before"


def test_a_download_that_broke_off_is_tried_again(server, tmp_path):
    assert fetch([server.url + "cut-once"], tmp_path / "text", SHA256) == server.url + "cut-once"
    assert server.seen == {"cut-once": 2}


def test_every_source_that_does_not_answer_is_named(server, tmp_path):
    with pytest.raises(InputError, match=r"could not download .*:1/: .*could not download .*missing: .*404"):
        fetch(["http://127.0.0.1:1/", server.url + "missing"], tmp_path / "text", None)


# Texts of the user's own


def test_a_local_text_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/mine.txt").write_bytes(b"<html> is how my own text begins\n")
    fetch_corpus(config_of("texts/mine.txt", sha256=None), Path("data/corpus.txt"))
    assert Path("data/corpus.txt").read_bytes() == Path("texts/mine.txt").read_bytes()
    assert sorted(path.name for path in Path("data").iterdir()) == ["corpus.sha256", "corpus.txt"]


def test_a_local_text_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"texts/mine.txt cannot be read \(No such file or directory\)"):
        fetch_corpus(config_of("texts/mine.txt"), Path("data/corpus.txt"))


def test_no_mirror_takes_the_place_of_a_local_text():
    with pytest.raises(ValueError, match=r"texts/mine.txt cannot have mirrors.*set corpus.mirrors to \[\]"):
        config_of("texts/mine.txt", "https://host/text")


@pytest.mark.security
@pytest.mark.parametrize(
    "source",
    [
        "",
        "mine.txt",
        "texts/../params.yaml",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://example.org/text",
        "https:///text",
        "wheel:plays",
        "wheel:plays==1.0",
        "wheel:plays==1.0/",
        "wheel:plays>=1.0/one.txt",
        "wheel:--index-url=http://example.org/==1/one.txt",
        "wheel:plays==1.0 --pre/one.txt",
    ],
)
def test_a_source_of_another_kind_is_refused(source):
    with pytest.raises(ValidationError, match="a source is a URL"):
        config_of(source)
    with pytest.raises(ValidationError, match="a source is a URL"):
        config_of("https://example.org/text", source)


# B2: not UTF-8, BOM, CRLF, NUL

quickly = settings(max_examples=20, deadline=None)
NOT_UTF8 = [b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80"]  # the middle two are cut or a surrogate
chunk_sizes = st.integers(3, 8)  # a chunk holds at least the byte order mark


def normalised(tmp_path_factory, raw: bytes, chunk_bytes: int) -> tuple[bytes, list[str]]:
    folder = tmp_path_factory.getbasetemp()
    (folder / "raw").write_bytes(raw)
    with patch.object(documents, "CHUNK_BYTES", chunk_bytes):
        told = write_documents({"texts/mine.txt": folder / "raw"}, folder / "text", "texts/mine.txt")
    return (folder / "text").read_bytes(), told


@quickly
@given(text=st.text("a\r\n\u00e9\u20ac\ufeff", min_size=1), bom=st.booleans(), chunk_bytes=chunk_sizes)
def test_b2_only_a_byte_order_mark_and_crlf_are_changed_and_both_are_told(tmp_path_factory, text, bom, chunk_bytes):
    text = text.lstrip("\ufeff") or "a"
    raw = text.encode("utf-8-sig" if bom else "utf-8")
    clean, changes = normalised(tmp_path_factory, raw, chunk_bytes)
    assert clean.decode() == text.replace("\r\n", "\n")
    crlf = text.count("\r\n")
    assert changes == [f"CRLF made LF: {crlf}"] * (crlf > 0) + ["byte order marks removed: 1"] * bom


@pytest.mark.fault
@quickly
@given(before=st.text("a\n\u00e9\u20ac"), bad=st.sampled_from(NOT_UTF8), after=st.text("a\n"), chunk_bytes=chunk_sizes)
def test_b2_text_that_is_not_utf8_is_refused_with_the_offset(tmp_path_factory, before, bad, after, chunk_bytes):
    with pytest.raises(InputError, match=f"texts/mine.txt is not UTF-8 at byte {len(before.encode())}: ") as caught:
        normalised(tmp_path_factory, before.encode() + bad + after.encode(), chunk_bytes)
    assert caught.value.exit_code == 2


@pytest.mark.fault
@quickly
@given(before=st.text("a\n\u00e9\u20ac"), after=st.text("a\0"), chunk_bytes=chunk_sizes)
def test_b2_a_nul_is_refused_with_the_offset(tmp_path_factory, before, after, chunk_bytes):
    with pytest.raises(InputError, match=f"texts/mine.txt holds a NUL at byte {len(before.encode())}: "):
        normalised(tmp_path_factory, f"{before}\0{after}".encode(), chunk_bytes)


PIECES = st.binary(max_size=12) | st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\0", codecs.BOM_UTF8, b"a\xc3\xa9", *NOT_UTF8]
)


@pytest.mark.fault
@quickly
@given(pieces=st.lists(PIECES, max_size=8), chunk_bytes=chunk_sizes)
def test_b2_any_bytes_are_a_text_as_it_is_said_or_refused_where_they_are_none(tmp_path_factory, pieces, chunk_bytes):
    raw = b"".join(pieces)
    try:
        text, bad = raw.decode(), len(raw)
    except UnicodeDecodeError as error:
        text, bad = None, error.start
    nul = raw.find(b"\0")
    try:
        clean, _ = normalised(tmp_path_factory, raw, chunk_bytes)
    except InputError as error:
        assert error.exit_code == 2  # noqa: PT017 (either outcome is right)
        said = str(error)
        if 0 <= nul < bad:
            assert f"at byte {nul}: " in said or f"at byte {bad}: " in said  # both, where they lie in one chunk
        elif text is None:
            assert f"is not UTF-8 at byte {bad}: " in said
        else:
            assert not text.removeprefix("\ufeff")
            assert "holds no text" in said
    else:
        assert nul < 0
        assert clean.decode() == text.removeprefix("\ufeff").replace("\r\n", "\n")


@pytest.mark.fault
def test_b2_a_text_that_goes_wrong_at_its_end_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/mine.txt").write_bytes(TEXT * 100 + b"\xff")
    with pytest.raises(InputError, match=r"texts/mine.txt is not UTF-8 at byte 1400000: "):
        fetch_corpus(config_of("texts/mine.txt", sha256=None), Path("data/corpus.txt"))
    assert list(Path("data").iterdir()) == []


@pytest.mark.parametrize("raw", [b"", codecs.BOM_UTF8])
def test_b3_a_text_without_characters_is_refused(tmp_path_factory, raw):
    with pytest.raises(InputError, match="holds no text"):
        normalised(tmp_path_factory, raw, 8)


def test_the_hash_in_params_is_that_of_the_text_before_normalising(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/mine.txt").write_bytes(b"one\r\ntwo\r\n")
    fetch_corpus(config_of("texts/mine.txt", sha256=hashlib.sha256(b"one\r\ntwo\r\n").hexdigest()), Path("corpus.txt"))
    assert Path("corpus.txt").read_bytes() == b"one\ntwo\n"
    assert "CRLF made LF: 2" in capsys.readouterr().out
    verify_corpus(Path("corpus.txt"))


def test_a_text_is_never_in_memory_as_a_whole(tmp_path):
    (tmp_path / "raw").write_bytes(TEXT * 400)  # 5.6 MB
    with patch.object(documents, "CHUNK_BYTES", 1 << 14):
        tracemalloc.start()
        write_documents({"raw": tmp_path / "raw"}, tmp_path / "text", "raw")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 500_000  # a few chunks of 16 KiB, and the files' own buffers


# B6: DVC checks out an altered cache entry without a word


@pytest.mark.fault
def test_b6_an_altered_corpus_is_refused_with_a_hint(server, tmp_path):
    fetch_corpus(config_of(server.url + "good"), path := tmp_path / "corpus.txt")
    verify_corpus(path)
    path.write_bytes(TEXT.replace(b"Speak", b"speak", 1))
    with pytest.raises(
        IntegrityError, match=rf"corpus.txt is altered .*expected {SHA256}.*chmod .*dvc repro -f download"
    ):
        verify_corpus(path)


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.sha256"])
def test_a_corpus_that_is_not_there_is_named_with_the_command_that_makes_it(server, tmp_path, name):
    fetch_corpus(config_of(server.url + "good"), tmp_path / "corpus.txt")
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} not found: run `dvc repro download`"):
        verify_corpus(tmp_path / "corpus.txt")
