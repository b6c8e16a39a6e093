import os
import resource
import shutil
import struct
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import token_files as module
from pipeline.data.token_files import HEADER, TokenFolder, shard_name, write_shard
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import MANIFEST, atomic_file, atomic_folder, write_manifest

quickly = settings(max_examples=20, deadline=None)


def written(folder: Path, ids, shard_tokens=1000, vocab_size=50257) -> Path:
    with atomic_folder(folder) as unfinished:
        for index, start in enumerate(range(0, max(len(ids), 1), shard_tokens)):
            batches = (
                [ids[start : start + 3], ids[start + 3 : start + shard_tokens]]
                if shard_tokens > 3
                else [ids[start : start + shard_tokens]]
            )
            write_shard(unfinished / shard_name("train", index), batches, vocab_size)
    return folder


# What is written


@pytest.mark.parametrize("bad", [-1, 50257, 65536, 65536 + 7])
def test_an_id_outside_of_the_vocabulary_is_never_wrapped_into_it(tmp_path, bad):
    with pytest.raises(ValueError, match=str(bad)), atomic_file(tmp_path / "train-00000.bin") as unfinished:
        write_shard(unfinished, [[1, 2], [1, bad, 2]], 50257)
    assert list(tmp_path.iterdir()) == []


# What is read


@quickly
@given(ids=st.lists(st.integers(0, 50256), max_size=30), shard_tokens=st.integers(1, 8), data=st.data())
def test_any_span_reads_alike_across_shards(tmp_path_factory, ids, shard_tokens, data):
    tokens = TokenFolder(written(tmp_path_factory.getbasetemp() / "shards", ids, shard_tokens)).train
    assert len(tokens) == len(ids)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert tokens.read(start, stop).dtype == np.uint16
    assert tokens.read(start, stop).tolist() == ids[start:stop]
    with patch.object(module, "BLOCK_TOKENS", 3):
        assert tokens.counts().tolist() == np.bincount(np.array(ids, np.int64), minlength=50257).tolist()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 11), (5, 4)])
def test_reading_outside_of_the_part_is_an_error(tmp_path, start, stop):
    tokens = TokenFolder(written(tmp_path / "tokens", list(range(10)))).train
    with pytest.raises(IndexError, match="has 10 tokens"):
        tokens.read(start, stop)


def test_hundreds_of_shards_are_read_with_few_open_files(tmp_path):
    folder = written(tmp_path / "tokens", list(range(300)), shard_tokens=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        tokens = TokenFolder(folder).train
        assert tokens.read(0, 300).tolist() == list(range(300))
        assert [tokens.read(i, i + 1)[0] for i in range(0, 300, 7)] == list(range(0, 300, 7))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_span_is_found_without_looking_at_the_other_shards(tmp_path):
    looked_at = []

    class Watched(np.ndarray):
        def __getitem__(self, span):
            looked_at.append(self.number)
            return np.asarray(self)[span]

    def shard(number):
        ids = np.arange(10, dtype=np.uint16).view(Watched)
        ids.number = number
        return ids

    tokens = module.Tokens("text", [shard(number) for number in range(1000)], 50257)
    assert tokens.read(5008, 5012).tolist() == [8, 9, 0, 1]
    assert looked_at == [500, 501]


# B3: corpus empty, or shorter than one window


@pytest.mark.parametrize("length", [0, 1, 8])
def test_b3_too_few_tokens_are_told_with_the_number_needed(tmp_path, length):
    tokens = TokenFolder(written(tmp_path / "tokens", [7] * length)).train
    with pytest.raises(InputError, match=f"has {length} tokens, needs 9") as caught:
        tokens.require(9)
    assert caught.value.exit_code == 2
    tokens.require(length)


# B4: id >= vocab, odd length, truncated, other dtype, flipped bit


@pytest.mark.fault
@quickly
@given(bit=st.integers(0, 8 * (HEADER.size + 2 * 20) - 1))
def test_b4_any_flipped_bit_is_found(tmp_path_factory, bit):
    folder = written(tmp_path_factory.getbasetemp() / "flipped", list(range(20)))
    shard = folder / "train-00000.bin"
    altered = bytearray(shard.read_bytes())
    altered[bit // 8] ^= 1 << bit % 8
    shard.write_bytes(altered)
    with pytest.raises(IntegrityError, match=r"train-00000.bin is altered") as caught:
        TokenFolder(folder)
    assert caught.value.exit_code == 3


def with_header(shard: bytes, **changes: int | bytes) -> bytes:
    fields = dict(zip(("magic", "version", "dtype", "vocab_size", "length"), HEADER.unpack_from(shard), strict=True))
    return HEADER.pack(*{**fields, **changes}.values()) + shard[HEADER.size :]


WRONG_FILES = {
    "odd length": (lambda shard: shard + b"\0", "has 65 bytes, but should hold 20 tokens"),
    "truncated": (lambda shard: shard[:-2], "has 62 bytes, but should hold 20 tokens"),
    "truncated in the header": (lambda shard: shard[:10], "is not a token file"),
    "empty": (lambda shard: b"", "is not a token file"),
    "longer than it says": (lambda shard: with_header(shard, length=19), "should hold 19 tokens"),
    "other magic": (lambda shard: with_header(shard, magic=b"SOMETEXT"), "is not a token file"),
    "other format": (lambda shard: with_header(shard, version=2), "is not a token file of format 1"),
    "other dtype": (lambda shard: with_header(shard, dtype=32), "is not a token file"),
    "a vocabulary that fills the memory": (
        lambda shard: with_header(shard, vocab_size=2**32 - 1),
        "is not a token file",
    ),
    "a length that fills the memory": (lambda shard: with_header(shard, length=2**64 - 1), "has 64 bytes"),
}


@pytest.mark.fault
@pytest.mark.parametrize(("change", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_b4_a_wrong_file_is_found_even_where_its_manifest_agrees(tmp_path, change, message):
    folder = written(tmp_path / "tokens", list(range(20)))
    shard = folder / "train-00000.bin"
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(IntegrityError, match=r"train-00000.bin"):
        TokenFolder(folder)
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=f"train-00000.bin .*{message}") as caught:
        TokenFolder(folder)
    assert caught.value.exit_code == 3


@pytest.mark.fault
@pytest.mark.parametrize("vocab_size", [0, 19])
def test_b4_an_id_outside_of_the_vocabulary_is_not_counted(tmp_path, vocab_size):
    folder = written(tmp_path / "tokens", list(range(20)))
    shard = folder / "train-00000.bin"
    shard.write_bytes(with_header(shard.read_bytes(), vocab_size=vocab_size))
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=f"holds the id 19 of {vocab_size}"):
        TokenFolder(folder).train.counts()


WHOLE = HEADER.pack(b"GPT2TOKS", 1, 16, 50257, 4) + struct.pack("<4H", 1, 2, 3, 50256)


@st.composite
def shards(draw):
    """A token file of any bytes, or one with any bytes in some places, cut or prolonged."""
    shard = bytearray(WHOLE)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(shard)))
        some = draw(st.binary(max_size=8))
        shard[at : at + len(some)] = some
    return draw(st.binary(max_size=64) | st.just(bytes(shard)) | st.just(bytes(shard[: draw(st.integers(0, 40))])))


@pytest.mark.fault
@pytest.mark.security
@settings(max_examples=50, deadline=None)
@given(first=shards(), second=shards())
def test_b4_any_files_under_a_manifest_that_agrees_are_read_to_their_end_or_refused(tmp_path_factory, first, second):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for index, shard in enumerate((first, second)):
        (folder / shard_name("train", index)).write_bytes(shard)
    write_manifest(folder)
    try:
        tokens = TokenFolder(folder).train
        counts = tokens.counts()
    except IntegrityError as error:
        assert "/train" in str(error)  # noqa: PT017 (either outcome is right)
        assert error.exit_code == 3  # noqa: PT017
        return
    assert len(tokens.read(0, len(tokens))) == len(tokens) == counts.sum()
    assert len(counts) == tokens.vocab_size <= 65536


@pytest.mark.fault
@pytest.mark.parametrize("missing", ["train-00000.bin", "train-00001.bin", MANIFEST])
def test_b4_a_missing_file_is_found(tmp_path, missing):
    folder = written(tmp_path / "tokens", list(range(30)), shard_tokens=10)
    (folder / missing).unlink()
    with pytest.raises(IntegrityError, match=f"{missing} is missing"):
        TokenFolder(folder)


@pytest.mark.fault
def test_b4_a_surplus_shard_is_found(tmp_path):
    folder = written(tmp_path / "tokens", list(range(30)), shard_tokens=10)
    (folder / "train-00003.bin").write_bytes((folder / "train-00002.bin").read_bytes())
    with pytest.raises(IntegrityError, match=r"train-00003.bin is not in its manifest") as caught:
        TokenFolder(folder)
    assert caught.value.exit_code == 3


@pytest.mark.fault
@pytest.mark.parametrize("index", [0, 7, 19])
def test_b4_one_altered_or_shortened_shard_among_many_is_named(tmp_path, index):
    folder = written(tmp_path / "tokens", list(range(200)), shard_tokens=10)
    shard = folder / shard_name("train", index)
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + b"\1")
    with pytest.raises(IntegrityError, match=f"{shard.name} is altered .*dvc repro -f"):
        TokenFolder(folder)
    shard.write_bytes(data[:-2])
    with pytest.raises(IntegrityError, match=f"{shard.name} has {len(data) - 2} bytes, expected {len(data)}"):
        TokenFolder(folder)


def test_a_folder_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match="tokens not found: run `dvc repro tokenize`"):
        TokenFolder(tmp_path / "tokens")
