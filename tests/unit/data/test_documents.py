"""Files of text and JSONL, plain and compressed, in folders, globs and behind URLs -> one corpus."""

import gzip
import hashlib
import json
import os
import threading
import tracemalloc
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import CorpusConfig
from pipeline.data import documents
from pipeline.data.corpus import fetch_corpus
from pipeline.data.documents import find_files, read_documents, zstd
from pipeline.system.errors import InputError, IntegrityError

quickly = settings(max_examples=20, deadline=None)
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd().compress}
no_nul = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/README.md").write_text("how to")


def put(name: str, content: bytes | str) -> Path:
    """Write a text, compressed as its name says."""
    path = Path("texts", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK.get(path.suffix, bytes)(content.encode() if isinstance(content, str) else content))
    return path


def records(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def fetched(source: str, sha256: str | None = None) -> bytes:
    config = CorpusConfig(source=source, sha256=sha256, mirrors=[], tokenizer="gpt2", fraction=1.0, val_fraction=0.0)
    fetch_corpus(config, Path("data/corpus.txt"))
    return Path("data/corpus.txt").read_bytes()


# What is taken


def test_a_folder_of_all_kinds_becomes_one_text_in_the_order_of_its_paths(capsys):
    put("mix/b.jsonl.zst", records("second", "third\r\n"))
    put("mix/a.txt.gz", "\ufefffirst\n")
    put("mix/c/d.txt", "fourth")
    put("mix/c/e.md", "fifth")
    put("mix/.hidden", b"\xff")
    put("mix/.git/config", b"\xff")
    assert fetched("texts/mix") == b"first\n\0second\0third\n\0fourth\0fifth"
    told = "from texts/mix; 5 documents in 4 files; CRLF made LF: 1; byte order marks removed: 1"
    assert told in capsys.readouterr().out


def test_a_glob_takes_what_it_matches_and_the_readme_of_texts_is_no_text():
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt", ".e.txt"):
        put(name, name)
    assert fetched("texts/*.txt") == b"a.txt\0b.txt"
    assert fetched("texts/**/*.txt") == b"a.txt\0b.txt\0deep/d.txt"
    assert fetched("texts/*") == fetched("texts/?.*") == b"a.txt\0b.txt\0c.md"
    assert fetched("texts") == b"a.txt\0b.txt\0c.md\0deep/d.txt"


def test_a_file_whose_name_looks_like_a_glob_is_a_file():
    put("a[1].txt", "one")
    put("a1.txt", "other")
    assert fetched("texts/a[1].txt") == b"one"


@pytest.mark.parametrize("packing", PACK)
def test_a_single_file_gives_the_bytes_that_it_holds(packing):
    assert fetched(str(put(f"MINE.TXT{packing}", "a line\n" * 1000))) == b"a line\n" * 1000


def test_documents_without_text_are_none():
    put("mix/a.txt", "")
    put("mix/b.jsonl", "\n" + records("", "one", "") + " \n" + records("two"))
    put("mix/c.txt", "\ufeff")
    assert fetched("texts/mix") == b"one\0two"


@quickly
@given(texts=st.lists(no_nul, min_size=1), packing=st.sampled_from([*PACK]), chunk_bytes=st.integers(3, 8))
def test_b5_any_documents_come_back_as_they_went_in(texts, packing, chunk_bytes):
    texts = [text.lstrip("\ufeff").replace("\r\n", "\n") for text in texts]
    with patch.object(documents, "CHUNK_BYTES", chunk_bytes):
        for files in ({"all.jsonl": records(*texts)}, {f"{n:03}.txt": text for n, text in enumerate(texts)}):
            read = []
            for name, content in files.items():
                path = put(f"some/{name}{packing}", content)
                chunks, whole = read_documents(path, str(path), Counter()), b""
                for chunk in chunks:
                    whole += chunk
                    if not chunk:
                        read.append(whole.decode())
                        whole = b""
            assert read == texts


def test_several_members_of_a_compressed_file_are_all_read():
    Path("texts/two.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    Path("texts/two.txt.zst").write_bytes(zstd().compress(b"one\n") + zstd().compress(b"two\n"))
    assert fetched("texts/two.txt.gz") == fetched("texts/two.txt.zst") == b"one\ntwo\n"


def test_the_hash_of_several_files_is_that_of_their_bytes_as_stored():
    stored = b"".join(put(f"mix/{name}", name).read_bytes() for name in ("a.txt", "b.txt.gz"))
    right, wrong = hashlib.sha256(stored).hexdigest(), "0" * 64
    assert fetched("texts/mix", right) == b"a.txt\0b.txt.gz"
    with pytest.raises(IntegrityError, match=f"texts/mix has SHA-256 {right}, expected {wrong}"):
        fetched("texts/mix", wrong)


@pytest.mark.parametrize("name", ["some.jsonl.zst", "some.jsonl.zst?raw=1"])
def test_what_is_behind_a_url_is_read_by_its_name(name):
    put("some.jsonl.zst", records("one", "two"))
    handler = partial(SimpleHTTPRequestHandler, directory="texts")
    with (
        patch.object(SimpleHTTPRequestHandler, "log_message", lambda *_: None),
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    ):
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            assert fetched(f"http://127.0.0.1:{server.server_port}/{name}") == b"one\0two"
        finally:
            server.shutdown()


# What is refused

LINES = '{"text": "one"}\n'
REFUSED = {
    "missing": ("texts/none.txt", None, r"texts/none.txt cannot be read \(No such file or directory\)"),
    "empty folder": ("texts/empty", ("empty/.keep", ""), "texts/empty is a folder without texts"),
    "no match": ("texts/*.gz", None, "texts/\\*.gz matches no file"),
    "bad glob": ("texts/**x", None, "texts/\\*\\*x is not a glob"),
    "no text at all": ("texts/mix", ("mix/b.jsonl", records("")), "texts/mix holds no text"),
    "mixed encodings": ("texts/mix", ("mix/b.txt", "aé".encode("latin-1")), "texts/mix/b.txt is not UTF-8 at byte 1"),
    "encoding of JSONL": ("texts/mix", ("mix/b.jsonl", LINES.encode() + b'\xff'), "b.jsonl is not UTF-8 at byte 16"),
    "of compressed text": ("texts/mix", ("mix/b.txt.gz", b"ab\xff"), "b.txt.gz is not UTF-8 at byte 2"),
    "a NUL": ("texts/mix", ("mix/b.txt.zst", "a\0"), "b.txt.zst holds a NUL at byte 1"),
    "no JSON": ("texts/b.jsonl", ("b.jsonl", LINES + "\n{one}\n"), "texts/b.jsonl line 3 is not JSON"),
    "deep JSON": ("texts/b.jsonl", ("b.jsonl", LINES + "[" * 100_000), "line 2 is not JSON"),
    "no record": ("texts/b.jsonl", ("b.jsonl", LINES + "[1]"), 'line 2 has no text: a record reads {"text": "..."}'),
    "no key": ("texts/b.jsonl", ("b.jsonl", LINES * 2 + '{"body": "a"}'), "line 3 has no text"),
    "no string": ("texts/b.jsonl", ("b.jsonl", '{"text": 1}'), "line 1 has no text"),
    "NUL in JSON": ("texts/b.jsonl", ("b.jsonl", records("a\0b")), "line 1 holds a NUL"),
    "half a character": ("texts/b.jsonl", ("b.jsonl", '{"text": "\\ud800"}'), "line 1 holds half a surrogate pair"),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize(("source", "file", "message"), REFUSED.values(), ids=REFUSED)
def test_b2_what_is_no_text_is_refused_by_name_and_leaves_nothing(source, file, message):
    if file:
        put(*file)
    if source == "texts/mix" and "no text" not in message:
        put("mix/a.txt", "good\n")
    with pytest.raises(InputError, match=message.replace("{", r"\{")) as caught:
        fetched(source)
    assert caught.value.exit_code == 2
    assert list(Path("data").iterdir()) == []


@pytest.mark.fault
@pytest.mark.parametrize("name", ["b.txt.gz", "b.jsonl.zst"])
@pytest.mark.parametrize("fault", ["cut off", "emptied", "other bytes", "flipped bit"])
def test_a_compressed_file_that_is_cut_off_or_altered_is_named(name, fault):
    put("mix/a.txt", "good\n")
    path = put(f"mix/{name}", records(*(os.urandom(8).hex() for _ in range(1000))))
    data = bytearray(path.read_bytes())
    if fault == "flipped bit":
        data[len(data) // 2] ^= 1
    damaged = {"cut off": data[:-3], "emptied": b"", "other bytes": b"plain text", "flipped bit": bytes(data)}[fault]
    if (fault, path.suffix) == ("emptied", ".gz"):
        damaged = data[:5]  # gzip takes no bytes at all for no text
    if (fault, path.suffix) == ("flipped bit", ".zst"):
        damaged = data[:4] + bytes([data[4] ^ 8]) + data[5:]  # a reserved bit: zstd's own frames have no checksum here
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=f"texts/mix/{name} is cut off or altered") as caught:
        fetched("texts/mix")
    assert caught.value.exit_code == 3
    assert list(Path("data").iterdir()) == []


@pytest.mark.security
@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.txt.zst"])
def test_a_bomb_is_unpacked_bit_by_bit(name):
    path = put(name, b"0" * (50 << 20))
    tracemalloc.start()
    size = sum(map(len, read_documents(path, name, Counter())))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 50 << 20
    assert peak_bytes < 4 << 20  # a few chunks of 256 KiB


@pytest.mark.security
def test_a_line_that_would_not_fit_into_memory_is_refused():
    path = put("bomb.jsonl.gz", '{"text": "' + "0" * 1000)
    with (
        patch.object(documents, "MOST_LINE_BYTES", 1000),
        pytest.raises(InputError, match=r"bomb.jsonl.gz line 1 has more than 1,000 bytes"),
    ):
        list(read_documents(path, str(path), Counter()))


@pytest.mark.fault
@quickly
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from([*LINES, '"', "{", "\\", "\n"])).map("".join).map(str.encode),
    name=st.sampled_from([f"any{kind}{packing}" for kind in (".txt", ".jsonl") for packing in PACK]),
    packed=st.booleans(),
)
def test_b2_any_bytes_in_any_kind_of_file_are_text_or_refused_by_name(content, name, packed):
    path = Path("texts", name)
    path.write_bytes(PACK.get(path.suffix, bytes)(content) if packed else content)
    try:
        b"".join(read_documents(path, str(path), Counter())).decode()
    except (InputError, IntegrityError) as error:
        assert str(path) in str(error)  # noqa: PT017 (either outcome is right)
        assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_files_of_a_folder_are_found_wherever_they_are_in_it():
    for name in ("f/b", "f/a/c", "f/a/.d", "f/.e/g"):
        put(name, "x")
    assert find_files("texts/f/") == [Path("texts/f/a/c"), Path("texts/f/b")]
