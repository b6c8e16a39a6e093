"""Texts and tables, plain and compressed, in folders and globs: which are read, and which are refused."""

import codecs
import gzip
import json
import os
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures_tokenizer import corpus_config
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data import documents, tables
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


def parquet(group_rows: int = 2, **columns: object) -> bytes:
    pq.write_table(pa.table(columns), sink := pa.BufferOutputStream(), row_group_size=group_rows, use_dictionary=False)
    return sink.getvalue().to_pybytes()


def fetched(source: str, column: str | None = None) -> bytes:
    fetch_corpus(corpus_config(source, column=column), Path("data/corpus.txt"))
    return Path("data/corpus.txt").read_bytes()


# What is read


def test_a_folder_of_all_kinds_becomes_one_text_in_the_order_of_its_paths(capsys):
    put("mix/b.jsonl.zst", "\ufeff" + records("second", "", "third\r\n") + " \n")
    put("mix/a.txt.gz", "\ufefffirst\n")
    put("mix/c/d.txt", "fourth")
    put("mix/c/e.md", "fifth")
    put("mix/c/f.json", records("sixth", "seventh"))
    put("mix/c/g.ndjson.gz", records("eighth"))
    put("mix/c/h.log", "ninth")
    put("mix/c/h.log.dvc", "outs:")
    Path("texts/mix/c/i.txt").symlink_to(put("../tenth", "tenth").resolve())
    put("mix/d.parquet", parquet(id=[1, 2], text=["eleventh", None]))
    put("mix/e.csv.gz", '\ufefftext,n\n"twelfth,\r\n""and"" more",1\n\n"",2\n')
    put("mix/f.tsv.zst", "n\tverse\n1\tthirteenth\n")
    for empty in ("mix/c/empty.txt", "mix/c/empty.jsonl"):
        put(empty, "")
    for hidden in ("mix/.hidden", "mix/.git/config"):
        put(hidden, b"\xff")
    assert (
        fetched("texts/mix") == b"first\n\0second\0third\n\0fourth\0fifth\0sixth\0seventh\0eighth\0ninth\0tenth"
        b'\0eleventh\0twelfth,\n"and" more\0thirteenth'
    )
    notes = "13 documents in 13 files; CRLF replaced by LF: 2; byte order marks removed: 1"
    notes += "; rows of the column 'text': 10; rows of the column 'verse': 1"
    size = Path("data/corpus.txt").stat().st_size
    assert capsys.readouterr().out == f"texts/mix: {size} bytes; {notes}\n"


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


TEXTS = ["aaa", "bb\n", "c"]
TABLES = {  # a table with the texts of TEXTS in the column `poem`, and with other columns
    "strings.csv": 'id,poem\nx1,aaa\nx2,"bb\n"\nx3,c\n',
    "semicolons.csv": "\ufeffno;poem\n1;aaa\n2;'bb\n3;c".replace("'bb", '"bb\n"'),
    "tabs.csv": 'poem\tx\naaa\t\n"bb\n"\t-1e5\nc\t.5',
    "bars.csv": 'no|poem\r\n1|aaa\r\n2|"bb\n"\r\n3|c\r\n',
    "tabs.tsv": 'no\tpoem\n1\taaa\n2\t"bb\n"\n3\tc',
    "lines.jsonl": "".join(json.dumps({"n": 1, "poem": text}) + "\n" for text in TEXTS),
    "plain.parquet": parquet(n=[1, 2, 3], poem=TEXTS),
    "compressed.parquet.gz": gzip.compress(parquet(n=[1, 2, 3], poem=pa.array(TEXTS, pa.large_string()))),
    "categories.parquet": parquet(when=pa.array([1, 2, 3], pa.date32()), poem=pa.array(TEXTS).dictionary_encode()),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_column_of_texts_is_the_one_that_is_named_or_else_the_only_one(name):
    source = str(put(name, TABLES[name]))
    expected = "\0".join(TEXTS).encode()
    assert fetched(source, "poem") == expected
    if name == "strings.csv":
        with pytest.raises(
            InputError, match=r"^texts/strings.csv has no column 'text': set corpus.column to .* 'id', 'p"
        ):
            fetched(source)
    else:
        assert fetched(source) == expected
    with pytest.raises(InputError, match=r"has no column 'Poem': set corpus.column to one of .*'poem'$") as caught:
        fetched(source, "Poem")
    assert caught.value.exit_code == 2
    if name == "bars.csv":
        assert fetched(source, "no") == b"1\x002\x003"  # a column of numbers, which is named


def test_a_column_text_has_precedence_over_others():
    for name, content in {
        "a.csv": "a,text\nx,1\n",
        "a.jsonl": '{"a": "x", "text": "1"}\n{"a": null, "text": null}',
        "a.parquet": parquet(a=["x"], text=["1"]),
    }.items():
        assert fetched(str(put(name, content))) == b"1"
        assert fetched(f"texts/{name}", "a") == b"x"
    assert fetched(str(put("long.csv", "text\n" + "a" * 200_000))) == b"a" * 200_000


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
PARQUET = parquet(text=["abcdefgh" * 9])
LATIN_1 = parquet(
    text=pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
)
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
    "DVC pointer as text": ("texts/b.txt", ("b.txt", "outs:\n- md5: 0f1e\n  size: 9\n"), "b.txt is DVC's pointer to a"),
    "DVC pointer of an import": (
        "texts/b.csv",
        ("b.csv", f"md5: {'0f' * 16}\nfrozen: true\ndeps:\n- path: b.csv\nouts:\n- md5: 0f1e\n"),
        "b.csv is DVC's pointer to a text",
    ),
    "LFS pointer as text": (
        "texts/b.txt",
        ("b.txt", "version https://git-lfs.github.com/spec/v1"),
        "a Git LFS pointer",
    ),
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
    "SQLite": ("texts/b.txt", ("b.txt", b"SQLite format 3\0"), "b.txt is a table or database: write its texts as JSON"),
    "Parquet": ("texts/b.txt", ("b.txt", b"PAR1\x15"), "b.txt is a Parquet table: save it under a name that ends with"),
    "not Parquet": (
        "texts/b.parquet",
        ("b.parquet", "text,label"),
        r"b.parquet is truncated or corrupt \(.*magic bytes",
    ),
    "truncated Parquet": ("texts/b.parquet", ("b.parquet", PARQUET[:-9]), "b.parquet is truncated or corrupt"),
    "flipped bit in Parquet": (
        "texts/b.parquet",
        ("b.parquet", flipped(PARQUET, 20, 255)),
        "b.parquet is truncated or corrupt",
    ),
    "Parquet of numbers": (
        "texts/b.parquet",
        ("b.parquet", parquet(a=[1])),
        "has no column 'text', and no other column",
    ),
    "numbers as text": (
        "texts/b.parquet",
        ("b.parquet", parquet(text=[1], b=["x"], c=["y"])),
        "no text in .* one of 'b', 'c'",
    ),
    "NUL in Parquet": ("texts/b.parquet", ("b.parquet", parquet(text=["a", "b\0"])), "row 2 contains a NUL"),
    "not UTF-8 in Parquet": ("texts/b.parquet", ("b.parquet", LATIN_1), "b.parquet is not UTF-8 after row 0"),
    "CSV of another width": (
        "texts/b.csv.zst",
        ("b.csv.zst", "text,n\na, b,1\n"),
        "line 2 has 3 fields, the header has 2",
    ),
    "open quote": (
        "texts/b.csv",
        ("b.csv", 'text,n\n"a,1\nb,2\n'),
        r"b.csv line 3 is not CSV \(unexpected end of data",
    ),
    "stray quote": ("texts/b.csv", ("b.csv", 'text,n\n"a" b,1\n'), "b.csv line 2 is not CSV .*: write a field with a"),
    "NUL in CSV": ("texts/b.csv", ("b.csv", "text,n\n\na\0,1\n"), "b.csv line 3 contains a NUL"),
    "encoding of CSV": ("texts/b.csv", ("b.csv", "text\naé".encode("latin-1")), "b.csv is not UTF-8 at byte 6"),
    "CSV of numbers": ("texts/b.csv", ("b.csv", "a,b\n1,2\n"), "b.csv has no column 'text', and no other column"),
    "CSV without rows": ("texts/b.csv", ("b.csv", "a,b\n"), "texts/b.csv contains no text"),
    "JSON": ("texts/b.txt", ("b.txt", '\n[ {"text": "a"}]'), r"b.txt is JSON: save it as JSON Lines \(.jsonl\), where"),
    "notebook": ("texts/b.ipynb", ("b.ipynb", '{\n "cells": [\n'), "b.ipynb is a notebook: save it as text with `jup"),
    "HTML": ("texts/b.txt", ("b.txt", "\n<!-- a -->\n<HTML lang='en'>"), "b.txt is an HTML page: save its text, or"),
    "HTML after many comments": ("texts/b.txt", ("b.txt", "<!-- - > -->\n" * 30 + "<html>"), "b.txt is an HTML page"),
    "text in a later record": (
        "texts/b.jsonl",
        ("b.jsonl", '{"n": 1, "title": "A"}\n{"n": 2, "title": "B", "text": "b"}'),
        "b.jsonl line 2 has the column 'text', but 'title' was read before: set corpus.column",
    ),
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
        monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    kind, code = (IntegrityError, 3) if "corrupt" in message else (InputError, 2)
    with pytest.raises(kind, match=message.replace("{", r"\{")) as caught:
        fetched(source)
    assert caught.value.exit_code == code
    assert list(Path("data").iterdir()) == []


def test_a_text_that_begins_with_many_html_comments_is_a_text():
    comments = b"<!-- toc -->\n" * 38 + b"# Notes\n"  # an ambiguous pattern would try 2^38 ways
    assert fetched(str(put("notes.md", comments))) == comments


def test_a_title_is_read_beside_a_later_text_if_its_column_is_named():
    path = put("b.jsonl", '{"title": "A"}\n{"title": "B", "text": "b"}')
    assert fetched(str(path), "title") == b"A\0B"


def test_zstd_may_refer_far_back_as_with_its_option_long():
    window = {zstd().CompressionParameter.window_log: 30, zstd().CompressionParameter.enable_long_distance_matching: 1}
    with zstd().open("texts/long.txt.zst", "wb", options=window) as file:  # of unknown size, so that the window counts
        file.write(b"one line\n")
    assert fetched("texts/long.txt.zst") == b"one line\n"


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


ROWS = [random.Random(number).randbytes(250).hex() for number in range(10_000)]
LONG = {f"large.txt{suffix}": "0123456789\n" * 450_000 for suffix in COMPRESS}
LONG |= {"large.csv": "\n".join(["text", *ROWS]), "large.jsonl": records(*ROWS)}
POOL = pa.proxy_memory_pool(pa.default_memory_pool())  # it must not be freed before what it has allocated
LONG |= {"large.parquet": parquet(10_000, text=ROWS)}  # one row group


@pytest.mark.parametrize("name", LONG)
def test_a_large_text_or_a_bomb_is_read_in_little_memory(name):
    path = put(name, LONG[name])
    pa.set_memory_pool(POOL)
    tracemalloc.start()
    write_documents({path.name: path}, Path("text"), "large")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pa.set_memory_pool(pa.default_memory_pool())
    assert 4_900_000 < Path("text").stat().st_size < 5_100_000
    assert max(peak_bytes, POOL.max_memory()) < 3_000_000  # a few chunks of 256 KiB
    assert POOL.max_memory() or name != "large.parquet"
