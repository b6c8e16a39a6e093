"""Which files of a data set are read."""

import re

import pytest

from pipeline.data.remote import choose_files, without_queries
from pipeline.system.errors import InputError

POEMS = [
    "README.md",
    ".gitattributes",
    "dataset_infos.json",
    "data/train-00000-of-00002.csv.gz",
    "data/train-00001-of-00002.csv.gz",
    "data/test-00000-of-00001.csv.gz",
    "raw/b.txt",
    "raw/a[1].txt",
    "raw/more/c.txt",
    "raw/.hidden/d.txt",
]
TRAIN, B, C = POEMS[3:5], "raw/b.txt", "raw/more/c.txt"
CHOICES = {
    "": TRAIN,  # the training split
    "data": [POEMS[5], *TRAIN],
    "data/": [POEMS[5], *TRAIN],
    "data/t*n-*": TRAIN,
    "raw/a[1].txt": ["raw/a[1].txt"],  # a file has precedence over a glob
    "raw": ["raw/a[1].txt", B, C],
    "raw/*": ["raw/a[1].txt", B],
    "raw/?.txt": [B],
    "**/*.txt": ["raw/a[1].txt", B, C],
    "raw/**": ["raw/a[1].txt", B, C],
    "raw/**/c.txt": [C],
    "README.md": ["README.md"],
}


@pytest.mark.parametrize("pattern", CHOICES)
def test_files_are_chosen_by_path_folder_glob_or_split(pattern):
    assert choose_files(POEMS, pattern, "hf://datasets/a/b") == CHOICES[pattern]


def test_without_a_path_the_files_must_be_of_one_kind_in_one_folder():
    for listing, expected in {
        "b.txt a.txt LICENSE image.png": "a.txt b.txt",
        "a-test.txt a_train.txt constraint.txt retrain.txt": "a_train.txt",
        "train/b.jsonl.zst train/a.jsonl.gz test/a.jsonl train/x.md": "train/a.jsonl.gz train/b.jsonl.zst",
    }.items():
        assert choose_files(listing.split(), "", "hf://a") == expected.split()
    for listing, named in {
        "train.txt train.csv": "(train.csv, train.txt)",
        "en/train-1.txt en/train-2.txt fr/train.txt": "(en/train-1.txt, fr/train.txt)",
        "a.png": "no texts and no tables",
    }.items():
        with pytest.raises(InputError, match=re.escape(named) + ": name a file, a folder or a glob of it"):
            choose_files(listing.split(), "", "hf://a")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x*", r"hf://a matches no file: it has data/test-00000-of-00001.csv.gz, data/.*, \.\.\.$"),
        ("**x", r"hf://a: \*\* must be a whole part"),
        ("dat", "matches no file"),
    ],
)
def test_a_pattern_without_a_file_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        choose_files(POEMS, pattern, "hf://a")


def test_no_signature_of_a_url_is_printed():
    error = OSError("403 for url 'https://host/file?X-Amz-Signature=abc&b=1'\nretry")
    assert without_queries(error) == "403 for url 'https://host/file' retry"
