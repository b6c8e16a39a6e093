"""Token files: any span is read as it was written, and no altered file is accepted."""

import os
import resource
import struct
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import token_files
from pipeline.data.token_files import HEADER, TokenFolder, Tokens, count_tokens, shard_name, write_shard
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import atomic_file, atomic_folder, write_manifest

IDS = struct.pack("<20H", *range(20))


def header(magic=b"GPT2TOKS", version=1, dtype=16, vocab_size=50257, length=20) -> bytes:
    return HEADER.pack(magic, version, dtype, vocab_size, length)


def written(folder: Path, ids, shard_tokens=1000) -> Path:
    """Write `ids` as the part `train`, each shard in two batches."""
    with atomic_folder(folder) as unfinished:
        for index, start in enumerate(range(0, max(len(ids), 1), shard_tokens)):
            shard = ids[start : start + shard_tokens]
            write_shard(unfinished / shard_name("train", index), [shard[:3], shard[3:]], 50257)
    return folder


@pytest.mark.parametrize("bad", [-1, 50257, 65536, 65536 + 7])
def test_an_id_outside_of_the_vocabulary_is_never_wrapped_into_it(tmp_path, bad):
    with pytest.raises(ValueError, match=str(bad)), atomic_file(tmp_path / "train-00000.bin") as unfinished:
        write_shard(unfinished, [[1, 2], [1, bad, 2]], 50257)
    assert list(tmp_path.iterdir()) == []


# What is read


@given(ids=st.lists(st.integers(0, 50256), max_size=30), shard_tokens=st.integers(1, 8), data=st.data())
def test_any_span_is_read_across_shards(tmp_path_factory, ids, shard_tokens, data):
    folder = written(tmp_path_factory.getbasetemp() / "shards", ids, shard_tokens)
    tokens = TokenFolder(folder).train
    assert len(tokens) == count_tokens(folder) == len(ids)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert tokens.read(start, stop).dtype == np.uint16
    assert tokens.read(start, stop).tolist() == ids[start:stop]
    with patch.object(token_files, "BLOCK_TOKENS", 3):
        assert tokens.counts().tolist() == np.bincount(np.array(ids, np.int64), minlength=50257).tolist()


def test_reading_outside_of_the_part_or_requiring_more_than_it_has_is_an_error():  # B3
    tokens = Tokens("some/train", [np.arange(8, dtype=np.uint16)], 50257)
    for start, stop in ((-1, 2), (0, 9), (5, 4)):
        with pytest.raises(IndexError, match="has 8 tokens"):
            tokens.read(start, stop)
    tokens.require(8)
    with pytest.raises(InputError, match="some/train has 8 tokens, needs 9") as caught:
        tokens.require(9)
    assert caught.value.exit_code == 2


def test_a_span_is_read_with_few_open_files_and_without_the_other_shards(tmp_path):
    folder = written(tmp_path / "tokens", list(range(100)), shard_tokens=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 50, hard))
    try:
        tokens = TokenFolder(folder).train
        assert tokens.read(0, 100).tolist() == list(range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for other in {*range(100)} - {50, 51}:
        (folder / shard_name("train", other)).unlink()
    assert tokens.read(50, 52).tolist() == [50, 51]


# B4: files that are missing, altered or not token files

SHARD = header() + IDS
NOT_TOKENS = "is not a token file of format 1"
WRONG_SHARDS = {
    "truncated": (SHARD[:-2], "has 62 bytes"),
    "odd length": (SHARD + b"x", "has 65 bytes"),
    "header only": (header(), "has 24 bytes"),
    "half a header": (SHARD[:10], NOT_TOKENS),
    "empty": (b"", NOT_TOKENS),
    "length": (header(length=19) + IDS, "its header says 19 tokens"),
    "length that fills the memory": (header(length=2**64 - 1) + IDS, "has 64 bytes"),
    "magic": (header(magic=b"SOMETEXT") + IDS, NOT_TOKENS),
    "format": (header(version=2) + IDS, NOT_TOKENS),
    "dtype": (header(dtype=32) + IDS, NOT_TOKENS),
    "vocabulary that fills the memory": (header(vocab_size=2**32 - 1) + IDS, NOT_TOKENS),
    "id outside of the vocabulary": (header(vocab_size=19) + IDS, "contains the id 19, but vocab_size is 19"),
    "no vocabulary": (header(vocab_size=0) + IDS, "contains the id 19, but vocab_size is 0"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_b4_a_wrong_shard_is_refused_even_if_the_manifest_agrees(tmp_path, content, message):
    folder = written(tmp_path / "tokens", list(range(20)))
    assert (folder / "train-00000.bin").read_bytes() == SHARD
    (folder / "train-00000.bin").write_bytes(content)
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=f"{tmp_path}/tokens/train.* {message}.*: rebuild it with") as caught:
        TokenFolder(folder).train.counts()
    assert caught.value.exit_code == 3


def test_b4_a_shard_that_differs_from_the_manifest_or_a_missing_folder_is_refused(tmp_path):
    shard = written(tmp_path / "tokens", list(range(20))) / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(IntegrityError, match=r"train-00000.bin is altered .*dvc repro -f"):
        TokenFolder(tmp_path / "tokens")
    for read in (TokenFolder, count_tokens):
        with pytest.raises(InputError, match="missing not found: run `dvc repro tokenize`, which makes it"):
            read(tmp_path / "missing")
