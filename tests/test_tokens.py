import struct
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline import tokens as module
from pipeline.errors import InputError, IntegrityError
from pipeline.files import MANIFEST, atomic_folder, write_manifest
from pipeline.tokens import HEADER, data_sha256, open_tokens, write_part, write_tokens

LINES = "".join(f"Line {number} of the play, as it's spoken.\n" for number in range(100))
quickly = settings(max_examples=60, deadline=None)


def written(folder: Path, ids, shard_tokens=1000, vocab_size=50257) -> Path:
    with atomic_folder(folder) as unfinished:
        write_part(unfinished, "train", [ids], vocab_size, shard_tokens)
    return folder


def text_of(tokenizer, folder: Path, part: str) -> str:
    tokens = open_tokens(folder, part)
    return tokenizer.decode(tokens.read(0, len(tokens)).tolist())


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(LINES)
    return path


# What is written


def test_the_whole_corpus_has_its_known_tokens(shakespeare, tokenizer, tmp_path):
    write_tokens(shakespeare, tokenizer, tmp_path / "tokens")
    tokens = open_tokens(tmp_path / "tokens", "train")
    assert len(tokens) == 338_025
    assert np.count_nonzero(tokens.counts()) == 11_706
    assert tokens.read(0, len(tokens)).tolist() == tokenizer.encode(shakespeare.read_text())


@quickly
@given(fraction=st.floats(0.05, 1), val_fraction=st.floats(0, 0.8), chunk_bytes=st.integers(1, 5000))
def test_shares_end_with_a_line_and_lose_none_between_them(
    tmp_path_factory, tokenizer, fraction, val_fraction, chunk_bytes
):
    longest_line = 45
    assume(len(LINES) * fraction * (1 - val_fraction) > 2 * longest_line)  # less may hold no whole line: refused, below
    folder = tmp_path_factory.getbasetemp() / "shares"
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text(LINES)
    with patch.object(module, "CHUNK_BYTES", chunk_bytes):
        write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", fraction, val_fraction)
    train, val = (text_of(tokenizer, folder / "tokens", part) for part in ("train", "val"))
    assert LINES.startswith(train + val)
    assert train.endswith("\n")
    assert int(len(LINES) * fraction) - longest_line < len(train + val) <= len(LINES) * fraction
    assert len(val) == 0 if val_fraction == 0 else len(val) >= len(train + val) * val_fraction - 1e-6


def test_a_text_without_a_last_line_end_is_taken_whole(tmp_path, tokenizer):
    (tmp_path / "corpus.txt").write_text("one\ntwo")
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens")
    assert text_of(tokenizer, tmp_path / "tokens", "train") == "one\ntwo"


def test_the_same_text_gives_the_same_bytes(corpus, tokenizer, tmp_path):
    for name in ("one", "two"):
        write_tokens(corpus, tokenizer, tmp_path / name, fraction=0.5, val_fraction=0.1)
    assert data_sha256(tmp_path / "one") == data_sha256(tmp_path / "two")
    write_tokens(corpus, tokenizer, tmp_path / "other", fraction=0.5, val_fraction=0.2)
    assert data_sha256(tmp_path / "one") != data_sha256(tmp_path / "other")


def test_a_text_is_never_in_memory_as_a_whole(tmp_path, tokenizer):
    (tmp_path / "corpus.txt").write_text(LINES * 400)  # 1.7 MB, which as a list of ids would take 4 MB
    with patch.object(module, "CHUNK_BYTES", 1 << 14):
        tracemalloc.start()
        write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", shard_tokens=10_000)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 700_000
    assert len(list((tmp_path / "tokens").glob("train-*.bin"))) > 40


@pytest.mark.parametrize("bad", [-1, 50257, 65536, 65536 + 7])
def test_an_id_outside_of_the_vocabulary_is_never_wrapped_into_it(tmp_path, bad):
    with pytest.raises(ValueError, match=str(bad)):
        write_part(tmp_path, "train", [[1, bad, 2]], 50257)
    assert list(tmp_path.iterdir()) == []


# What is read


@quickly
@given(ids=st.lists(st.integers(0, 50256), max_size=30), shard_tokens=st.integers(1, 8), data=st.data())
def test_any_stretch_reads_alike_across_shards(tmp_path_factory, ids, shard_tokens, data):
    tokens = open_tokens(written(tmp_path_factory.getbasetemp() / "shards", ids, shard_tokens), "train")
    assert len(tokens) == len(ids)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert tokens.read(start, stop).dtype == np.uint16
    assert tokens.read(start, stop).tolist() == ids[start:stop]
    with patch.object(module, "BLOCK_TOKENS", 3):
        assert tokens.counts().tolist() == np.bincount(np.array(ids, np.int64), minlength=50257).tolist()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 11), (5, 4)])
def test_reading_outside_of_the_part_is_an_error(tmp_path, start, stop):
    tokens = open_tokens(written(tmp_path / "tokens", list(range(10))), "train")
    with pytest.raises(IndexError, match="has 10 tokens"):
        tokens.read(start, stop)


# B3: corpus empty, or shorter than one window


@pytest.mark.parametrize("length", [0, 1, 8])
def test_b3_too_few_tokens_are_told_with_the_number_needed(tmp_path, length):
    tokens = open_tokens(written(tmp_path / "tokens", [7] * length), "train")
    with pytest.raises(InputError, match=f"has {length} tokens, needs 9") as caught:
        tokens.require(9)
    assert caught.value.exit_code == 2
    tokens.require(length)


@pytest.mark.parametrize(("text", "fraction", "val_fraction"), [("", 1, 0), ("one line", 0.5, 0), ("a\nb", 1, 0.9)])
def test_b3_a_share_without_a_whole_line_is_refused(tmp_path, tokenizer, text, fraction, val_fraction):
    (tmp_path / "corpus.txt").write_text(text)
    with pytest.raises(InputError, match=r"no whole line of .*corpus.txt is left to train on"):
        write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", fraction, val_fraction)
    assert not (tmp_path / "tokens").exists()


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
        open_tokens(folder, "train")
    assert caught.value.exit_code == 3


def with_header(shard: bytes, **changes: int | bytes) -> bytes:
    fields = dict(zip(("magic", "version", "dtype", "vocab_size", "length"), HEADER.unpack_from(shard), strict=True))
    return HEADER.pack(*{**fields, **changes}.values()) + shard[HEADER.size :]


WRONG_FILES = {
    "odd length": (lambda shard: shard + b"\0", "has 65 bytes, 20 tokens take 64"),
    "truncated": (lambda shard: shard[:-2], "has 62 bytes, 20 tokens take 64"),
    "truncated in the header": (lambda shard: shard[:10], "is no token file"),
    "empty": (lambda shard: b"", "is no token file"),
    "longer than it says": (lambda shard: with_header(shard, length=19), "19 tokens take 62"),
    "other magic": (lambda shard: with_header(shard, magic=b"SOMETEXT"), "is no token file"),
    "other format": (lambda shard: with_header(shard, version=2), "has format 2"),
    "other dtype": (lambda shard: with_header(shard, dtype=32), "dtype 32"),
    "id too large": (lambda shard: shard[:-2] + struct.pack("<H", 50257), "holds the id 50257"),
    "smaller vocabulary": (lambda shard: with_header(shard, vocab_size=19), "holds the id 19"),
}


@pytest.mark.fault
@pytest.mark.parametrize(("change", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_b4_a_wrong_file_is_found_even_where_its_manifest_agrees(tmp_path, change, message):
    folder = written(tmp_path / "tokens", list(range(20)))
    shard = folder / "train-00000.bin"
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(IntegrityError, match=r"train-00000.bin"):
        open_tokens(folder, "train")
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=f"train-00000.bin .*{message}") as caught:
        open_tokens(folder, "train")
    assert caught.value.exit_code == 3


@pytest.mark.fault
@pytest.mark.parametrize("missing", ["train-00000.bin", "train-00001.bin", MANIFEST])
def test_b4_a_missing_file_is_found(tmp_path, missing):
    folder = written(tmp_path / "tokens", list(range(30)), shard_tokens=10)
    (folder / missing).unlink()
    with pytest.raises(IntegrityError, match=f"{missing} is missing"):
        open_tokens(folder, "train")
    if missing != MANIFEST:
        write_manifest(folder)
        with pytest.raises(IntegrityError, match="lacks a shard of part train"):
            open_tokens(folder, "train")


@pytest.mark.fault
def test_b4_shards_of_two_vocabularies_do_not_mix(tmp_path):
    folder = written(tmp_path / "tokens", list(range(20)), shard_tokens=10)
    shard = folder / "train-00001.bin"
    shard.write_bytes(with_header(shard.read_bytes(), vocab_size=60000))
    write_manifest(folder)
    with pytest.raises(IntegrityError, match="has vocab_size 60000"):
        open_tokens(folder, "train")


def test_a_folder_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match="tokens not found: run `dvc repro tokenize`"):
        open_tokens(tmp_path / "tokens", "train")
