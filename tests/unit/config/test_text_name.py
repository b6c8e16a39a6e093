"""The name of a text, which its model and its runs have."""

import pytest

from pipeline.config.text_name import text_name
from pipeline.data.documents import OPENERS, TABLES


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("diary.txt", "diary"),
        ("texts/Diary.TXT", "Diary"),
        ("chapter.1.txt", "chapter.1"),
        ("texts/v1.2-notes.txt", "v1.2-notes"),
        ("notes.v2", "notes.v2"),
        ("texts", "texts"),
        ("notes/", "notes"),
        ("texts/notes/*.md", "notes"),
        ("~/input/**/*.txt", "input"),
        ("plays/input.txt", "plays"),
        ("红楼梦.txt", "红楼梦"),
        ("https://example.org/char-rnn/master/data/tinyshakespeare/input.txt", "tinyshakespeare"),
        ("https://example.org/plays/raw.txt?raw=1", "raw"),
        ("https://example.com/", "example.com"),
        ("hf://datasets/OWNER/NAME/data/train.parquet", "NAME"),
        ("hf://datasets/roneneldan/TinyStories/TinyStories-valid.txt", "TinyStories-valid"),
        ("s3://bucket/plays/hamlet.txt.gz", "hamlet"),
        ("s3://data/train.txt", "data"),
        ("*.txt", ""),
        *[(f"mail{suffix}{compression}", "mail") for suffix in (".txt", *TABLES) for compression in ("", *OPENERS)],
    ],
)
def test_a_text_has_a_short_name(source, name):
    assert text_name(source) == name
