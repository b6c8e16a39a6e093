"""Text and JSONL files, plain and compressed, in folders and globs: which are read, and which are refused."""

import codecs
import gzip
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from fixtures_tokenizer import corpus_config
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data import documents
from pipeline.data.corpus import fetch_corpus, write_documents
from pipeline.data.documents import read_documents, zstd
from pipeline.system.errors import InputError, IntegrityError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd().compress}
chunk_sizes = st.integers(3, 8)  # a chunk holds at least the byte order mark


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/README.md").write_text("how to")


def put(name: str, content: bytes | str) -> Path:
    """Write a text, compressed as its name says, or the bytes of a file."""
    path = Path("texts", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = COMPRESS.get(path.suffix, bytes)
    path.write_bytes(compress(content.encode()) if isinstance(content, str) else content)
    return path


def records(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def fetched(source: str) -> bytes:
    fetch_corpus(corpus_config(source), Path("data/corpus.txt"))
    return Path("data/corpus.txt").read_bytes()


# What is read


def test_a_folder_of_all_kinds_becomes_one_text_in_the_order_of_its_paths(capsys):
    put("mix/b.jsonl.zst", "\ufeff" + records("second", "", "third\r\n") + " \n")
    put("mix/a.txt.gz", "\ufefffirst\n")
    put("mix/c/d.txt", "fourth")
    put("mix/c/e.md", "fifth")
    put("mix/c/f.json", records("sixth", "seventh"))
    put("mix/c/g.ndjson.gz", records("eighth"))
    put("mix/c/h.log", records("ninth"))
    put("mix/c/h.log.dvc", "outs:")
    Path("texts/mix/c/i.txt").symlink_to(put("../tenth", "tenth").resolve())
    for empty in ("mix/c/empty.txt", "mix/c/empty.jsonl"):
        put(empty, "")
    for hidden in ("mix/.hidden", "mix/.git/config"):
        put(hidden, b"\xff")
    assert (
        fetched("texts/mix")
        == b'first\n\0second\0third\n\0fourth\0fifth\0sixth\0seventh\0eighth\0{"text": "ninth"}\n\0tenth'
    )
    notes = (
        "from texts/mix; 10 documents in 10 files; CRLF replaced by LF: 1; byte order marks removed: 1; files of JSON"
    )
    assert notes in capsys.readouterr().out


def test_a_glob_matches_visible_texts_and_not_the_readme_of_texts():
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt", ".e.txt", ".f/g.txt", "glob/a[1].txt", "glob/a1.txt"):
        put(name, name)
    assert fetched("texts/*.txt") == b"a.txt\0b.txt"
    assert fetched("texts/**/d*.txt") == fetched("texts/deep/") == b"deep/d.txt"
    assert fetched("texts/**") == fetched("texts/**/*") == fetched("texts/**/**") == fetched("texts")
    assert fetched("texts/**/*p/*") == b"deep/d.txt"
    assert fetched("texts/*") == fetched("texts/?.*") == b"a.txt\0b.txt\0c.md"
    assert fetched("texts") == b"a.txt\0b.txt\0c.md\0deep/d.txt\0glob/a1.txt\0glob/a[1].txt"
    assert fetched("texts/glob/a[1].txt") == b"glob/a[1].txt"  # a file has precedence over a glob


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_parts_of_a_single_file_are_read(suffix):
    half = COMPRESS[suffix](b"a line\n" * 500)
    path = Path("texts", f"mine.txt{suffix}".upper())
    path.write_bytes(half + half)  # a compressed file may have several members
    assert fetched(str(path)) == b"a line\n" * 1000


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), min_size=1, max_size=5),
    suffix=st.sampled_from([*COMPRESS]),
    chunk_bytes=chunk_sizes,
)
def test_b5_any_documents_are_read_as_they_were_written(texts, suffix, chunk_bytes):
    texts = [text.lstrip("\ufeff").replace("\r\n", "\n") for text in texts]
    for files in ({"all.jsonl": records(*texts)}, {f"{n:03}.txt": text for n, text in enumerate(texts)}):
        read, text = [], b""
        for name, content in files.items():
            path = put(f"some/{name}{suffix}", content)
            with patch.object(documents, "CHUNK_BYTES", chunk_bytes):
                for chunk in read_documents(path, str(path), Counter()):
                    text += chunk
                    if not chunk:
                        read.append(text.decode())
                        text = b""
        assert read == texts


NOT_UTF8 = [b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80"]  # the middle ones are cut or a surrogate


@given(
    bom=st.sampled_from([b"", codecs.BOM_UTF8]),
    good=st.text("a\r\n\u00e9\u20ac\ufeff").map(str.encode),
    bad=st.sampled_from([b"", b"\0", *NOT_UTF8]),
    rest=st.just(b"") | st.binary(max_size=12),
    chunk_bytes=chunk_sizes,
)
@example(bom=b"", good=b"aaa" + codecs.BOM_UTF8, bad=b"", rest=b"", chunk_bytes=3)  # only the first mark is removed
@example(bom=b"", good=b"aa\r\n", bad=b"", rest=b"", chunk_bytes=3)  # in two chunks
def test_b2_any_bytes_are_normalised_or_refused_with_the_offset(bom, good, bad, rest, chunk_bytes):
    raw = bom + good + bad + rest
    try:
        text, invalid = raw.decode(), len(raw)
    except UnicodeDecodeError as error:
        text, invalid = "", error.start
    nul = raw.find(b"\0")
    clean = text.removeprefix("\ufeff")
    files = {"texts/mine.txt": put("raw", raw)}
    with patch.object(documents, "CHUNK_BYTES", chunk_bytes):
        if "\0" not in clean and clean:
            notes = write_documents(files, Path("text"), "texts/mine.txt")
            assert Path("text").read_bytes().decode() == clean.replace("\r\n", "\n")
            crlf = text.count("\r\n")
            expected = [f"CRLF replaced by LF: {crlf}"] if crlf else []
            assert notes == expected + (["byte order marks removed: 1"] if text != clean else [])
            return
        with pytest.raises(InputError) as caught:
            write_documents(files, Path("text"), "texts/mine.txt")
    expected = [f"texts/mine.txt is not UTF-8 at byte {invalid}: "] if invalid < len(raw) else []
    if 0 <= nul < invalid:  # if both are in one chunk, either may be reported
        expected.append(f"texts/mine.txt contains a NUL at byte {nul}: ")
    assert str(caught.value).startswith(tuple(expected or ["texts/mine.txt contains no text"]))


# What is refused

LINES = '{"text": "one"}\n'
GZ, ZST = gzip.compress, zstd().compress
MANY = records(*map(str, range(1000))).encode()


def flipped(data: bytes, index: int, bits: int = 1) -> bytes:
    return data[:index] + bytes([data[index] ^ bits]) + data[index + 1 :]


REFUSED = {
    "missing": ("texts/none.txt", None, r"texts/none.txt cannot be read \(No such file or directory\)"),
    "empty folder": ("texts/empty", ("empty/.keep", ""), "texts/empty contains no texts"),
    "no match": ("texts/*.gz", None, "texts/\\*.gz matches no file"),
    "part of a name in **": (
        "texts/**x",
        None,
        r"texts/\*\*x: \*\* must be a whole part, as in texts/\*\*/\*.txt: fix",
    ),
    "no text": ("texts/b.jsonl", ("b.jsonl", records("")), "texts/b.jsonl contains no text"),
    "mixed encodings": ("texts/mix", ("mix/b.txt", "aé".encode("latin-1")), "texts/mix/b.txt is not UTF-8 at byte 1"),
    "encoding of JSONL": ("texts/mix", ("mix/b.jsonl", LINES.encode() + b"\xff"), "b.jsonl is not UTF-8 at byte 16"),
    "NUL": ("texts/mix", ("mix/b.txt.zst", "a\0"), "b.txt.zst contains a NUL at byte 1"),
    "not JSON": ("texts/b.jsonl", ("b.jsonl", LINES + "\n{one}\n"), "texts/b.jsonl line 3 is not JSON"),
    "deep JSON": ("texts/b.jsonl", ("b.jsonl", LINES + "[" * 100_000), "line 2 is not JSON"),
    "no record": ("texts/b.jsonl", ("b.jsonl", LINES + "[1]"), 'line 2 has no text: a record is {"text": "..."}'),
    "no string": ("texts/b.jsonl", ("b.jsonl", LINES * 2 + '{"text": 1}'), "line 3 has no text"),
    "NUL in JSON": ("texts/b.jsonl", ("b.jsonl", records("a\0b")), "line 1 contains a NUL"),
    "lone surrogate": ("texts/b.jsonl", ("b.jsonl", '{"text": "\\ud800"}'), "line 1 contains a lone surrogate"),
    "long line": ("texts/b.jsonl.gz", ("b.jsonl.gz", LINES + '"' + "0" * 1000), "line 2 has more than 1,000 bytes"),
    "truncated gz": ("texts/mix", ("mix/b.txt.gz", GZ(MANY)[:-3]), "mix/b.txt.gz is truncated or corrupt"),
    "half a gz header": ("texts/mix", ("mix/b.txt.gz", GZ(MANY)[:5]), "mix/b.txt.gz is truncated or corrupt"),
    "flipped bit in gz": ("texts/mix", ("mix/b.txt.gz", flipped(GZ(MANY), 500)), "b.txt.gz is truncated or corrupt"),
    "invalid block in gz": ("texts/mix", ("mix/b.gz", GZ(MANY)[:10] + b"\xff" * 9), "b.gz is truncated or corrupt"),
    "not gz": ("texts/mix", ("mix/b.txt.gz", b"plain text"), "mix/b.txt.gz is truncated or corrupt"),
    "truncated zst": ("texts/mix", ("mix/b.jsonl.zst", ZST(MANY)[:-3]), "b.jsonl.zst is truncated or corrupt"),
    "LFS pointer": (
        "texts/mix",
        ("mix/b.jsonl.gz", b"version https://git-lfs.github.com/spec/v1"),
        "a Git LFS pointer",
    ),
    "DVC pointer": ("texts/mix", ("mix/b.txt.dvc", "outs:"), "b.txt.dvc is DVC's pointer to a text"),
    "no suffix gz": (
        "texts/mix",
        ("mix/b.txt", GZ(MANY)),
        "b.txt is compressed with gzip: save it under a name that ends with .gz",
    ),
    "twice gz": ("texts/mix", ("mix/b.gz", GZ(GZ(MANY))), "b.gz is compressed with gzip"),
    "zip": ("texts/b.docx", ("b.docx", b"PK\3\4..."), "b.docx is an archive, as a .docx or .epub is"),
    "tar": ("texts/b.tar.gz", ("b.tar.gz", GZ(b"b.txt".ljust(257, b"\0") + b"ustar")), "b.tar.gz is an archive"),
    "PDF": ("texts/b.txt", ("b.txt", "%PDF-1.4"), "b.txt is a PDF"),
    "image": ("texts/b.txt", ("b.txt", b"\x89PNG\r\n"), "b.txt is an image"),
    "SVG": ("texts/b.svg", ("b.svg", '<?xml version="1.0"?>\n<svg>'), "b.svg is an image"),
    "Parquet": ("texts/b.txt", ("b.txt", b"PAR1\x15"), "b.txt is a table or database: write its texts as JSON Lines"),
    "CSV": ("texts/b.csv.zst", ("b.csv.zst", "text,label"), "b.csv.zst is a table: write its texts as JSON Lines"),
    "JSON array": ("texts/b.json", ("b.json", '[\n{"text": "a"}\n]'), "b.json line 1 begins a JSON array: write one"),
    "empty zst": ("texts/mix", ("mix/b.jsonl.zst", b""), "mix/b.jsonl.zst is truncated or corrupt"),
    "reserved bit in zst": ("texts/mix", ("mix/b.zst", flipped(ZST(MANY), 4, 8)), "b.zst is truncated or corrupt"),
    "not zst": ("texts/mix", ("mix/b.jsonl.zst", b"plain text"), "mix/b.jsonl.zst is truncated or corrupt"),
}


@pytest.mark.parametrize(("source", "file", "message"), REFUSED.values(), ids=REFUSED)
def test_b2_b5_a_file_that_is_not_a_text_is_named_and_leaves_no_corpus(source, file, message, monkeypatch):
    if file:
        put(*file)
        put("mix/a.txt", "good\n")
    if "1,000" in message:
        monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    kind, code = (IntegrityError, 3) if "corrupt" in message else (InputError, 2)
    with pytest.raises(kind, match=message.replace("{", r"\{")) as caught:
        fetched(source)
    assert caught.value.exit_code == code
    assert list(Path("data").iterdir()) == []


def test_a_link_to_a_folder_is_refused_since_dvc_sees_no_change_in_it():
    put("../elsewhere/a.txt", "a")
    put("b.txt", "b")
    Path("texts/books").symlink_to(Path("elsewhere").resolve())
    for source in ("texts", "texts/books", "texts/books/a.txt", "texts/*/*.txt", "texts/**/a.txt", "texts/b*/a.txt"):
        with pytest.raises(InputError, match="texts/books is a link to a folder, in which DVC sees no change: copy it"):
            fetched(source)
    assert fetched("texts/*.txt") == fetched("texts/*") == b"b"
    os.mkfifo("texts/pipe.txt")
    with pytest.raises(InputError, match=r"texts/pipe\.txt is a pipe or a device"):  # it would be waited for
        fetched("texts/pipe.txt")
    Path("texts/gone.txt").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"texts/gone.txt cannot be read \(No such"):
        fetched("texts/*.txt")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_large_text_or_a_bomb_is_read_in_little_memory(suffix):
    path = put(f"large.txt{suffix}", "0123456789\n" * 500_000)
    tracemalloc.start()
    write_documents({path.name: path}, Path("text"), "large")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert Path("text").stat().st_size == 5_500_000
    assert peak_bytes < 3_000_000  # a few chunks of 256 KiB
