"""Texts in an object store: which files are read, credentials, and what is refused. moto imitates S3."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest
from fixtures_tokenizer import corpus_config

from pipeline.data.corpus import fetch_corpus
from pipeline.data.remote import fetch_store
from pipeline.system.errors import InputError, IntegrityError

boto3 = pytest.importorskip("boto3", reason="boto3, s3fs and moto are in the extra dev")
pytest.importorskip("s3fs", reason="boto3, s3fs and moto are in the extra dev")
moto_server = pytest.importorskip("moto.server", reason="boto3, s3fs and moto are in the extra dev")

OBJECTS = {
    "poems/": b"",  # a folder, as the console makes it
    "poems/b.csv": b"n,poem\n1,second\n2,third\n",
    "poems/a.txt.gz": gzip.compress(b"first", mtime=0),
    "poems/.hidden.txt": b"hidden",
    "poems/more/c d+[1].txt": b"fourth",
    "poems/more/image.png": b"\x89PNG",
    "top.txt": b"top",
}


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(autouse=True)
def _bucket(endpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "hunter2", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="books")
    for key, body in OBJECTS.items():
        client.put_object(Bucket="books", Key=key, Body=body, ACL="public-read")


CHOICES = {
    "top.txt": "top",
    "poems/*": "first|second|third",
    "poems/**/*.txt": "fourth",
    "poems/more/c d+[1].txt": "fourth",  # a file has precedence over a glob
    "**/*.[tc]*": "first|second|third|fourth|top",
    "p*/b.csv": "second|third",
}


@pytest.mark.parametrize("key", CHOICES)
def test_files_are_chosen_by_key_or_glob(key, capfd):
    fetch_corpus(corpus_config(f"s3://books/{key}"), Path("data/corpus.txt"))
    assert Path("data/corpus.txt").read_text().replace("\0", "|") == CHOICES[key]
    assert sorted(path.name for path in Path("data").iterdir()) == ["corpus.sha256", "corpus.txt"]
    assert capfd.readouterr().err == ""  # no progress bar without a terminal


def test_a_folder_is_read_with_its_subfolders_and_its_files_are_named(tmp_path):
    for source in ("s3://books/poems", "s3://books/poems/"):
        names = [f"s3://books/{key}" for key in sorted(OBJECTS)[2:6]]
        assert [*fetch_store(source, tmp_path / "files")] == names
        with pytest.raises(InputError, match=r"^s3://books/poems/more/image.png is an image"):
            fetch_corpus(corpus_config(source), Path("data/corpus.txt"))


def test_the_hash_is_of_all_files_in_order_and_a_mirror_is_used_if_a_source_fails(capsys):
    sha256 = hashlib.sha256(OBJECTS["poems/a.txt.gz"] + OBJECTS["poems/b.csv"]).hexdigest()
    sources = ["s3://none/x", "s3://books/poems/b.csv", "http://127.0.0.1:1/x", "s3://books/poems/*"]
    fetch_corpus(corpus_config(*sources, sha256=sha256, column="poem"), Path("data/corpus.txt"))
    assert Path("data/corpus.txt").read_bytes() == b"first\0second\0third"
    said = capsys.readouterr().out
    assert re.search("skipped: could not download s3://none/x: The specified bucket does not exist\n", said)
    assert f"skipped: s3://books/poems/b.csv has SHA-256 {hashlib.sha256(OBJECTS['poems/b.csv']).hexdigest()}" in said
    with pytest.raises(IntegrityError, match="all sources failed"):
        fetch_corpus(corpus_config(*sources, sha256="0" * 64), Path("data/corpus.txt"))


def test_a_public_bucket_needs_no_credentials(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (file,) = fetch_store("s3://books/top.txt", tmp_path / "files").values()
    assert file.read_bytes() == b"top"


def test_what_cannot_be_read_is_named_in_one_line_without_credentials(monkeypatch, tmp_path):
    def refused(source: str) -> str:
        with pytest.raises(InputError) as caught:
            fetch_store(source, tmp_path / "files")
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for source in ("s3://books/none", "s3://books/none*", "s3://books/.hidden"):
        assert refused(source) == f"{source} matches no file: check corpus.source"
    assert refused("gs://books/a") == "gs://books/a needs the package gcsfs: `python -m pip install gcsfs` adds it"
    short = type("Short", (), {"isfile": lambda *_: True, "info": lambda *_: {"size": 9}})()
    short.get_file = lambda name, file, callback: Path(file).write_bytes(b"half")
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda source, **_: (short, source))
    assert refused("s3://books/a") == "could not download s3://books/a: ended after 4 of 9 bytes"
