import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import tokenizer as module
from pipeline.errors import InputError, IntegrityError
from pipeline.tokenizer import SPACE, load_tokenizer

quickly = settings(max_examples=200, deadline=None)
# All that GPT-2's split looks at: spaces of several kinds, \x1c (a space to Python, none to Unicode), contractions, ...
hard_text = st.text("  \n\r\t\u00a0\u3000\x1c'srveLl1.-\u00e9\u6f22\U0001f600", max_size=60)
# Runs of the two spaces that GPT-2 merges, so that a cut within them shows.
runs = st.lists(st.sampled_from(["\n", "\n\n", "\u00a0", "\u00a0\u00a0", "x"]), max_size=6).map("".join)


def whole(tokenizer, text):
    """What tiktoken itself makes of the text in one go."""
    return tokenizer._encoding.encode_ordinary(text)


# B5: round trip


@quickly
@given(text=st.text() | hard_text)
def test_b5_decoding_gives_back_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_b5_special_tokens_in_a_text_are_plain_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_a_lone_surrogate_becomes_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_the_encoding_is_gpt2s(tokenizer):
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]  # known from GPT-2's own code
    assert tokenizer.encode("") == []


def test_a_character_cut_in_two_is_not_lost_in_bytes(tokenizer):
    first, *_ = tokenizer.encode("\U0001f600")
    assert tokenizer.decode_bytes([first]) == "\U0001f600".encode()[: len(tokenizer.decode_bytes([first]))]
    assert tokenizer.decode([first]) == "\ufffd"


# Encoding piecemeal


@quickly
@given(chunks=st.lists(hard_text | runs | st.text(max_size=5), max_size=8))
def test_chunks_encode_as_the_whole_does(tokenizer, chunks):
    ids = [i for batch in tokenizer.encode_chunks(chunks) for i in batch]
    assert ids == whole(tokenizer, "".join(chunks))


@quickly
@given(text=hard_text | runs)
def test_a_cut_in_long_whitespace_changes_nothing(tokenizer, text):
    shorter = module.LONG_SPACE.pattern.replace("1000", "1")  # so that it cuts at all
    with patch.object(module, "LONG_SPACE", module.re.compile(shorter)):
        assert tokenizer.encode(text) == whole(tokenizer, text)


def test_chunks_are_encoded_as_soon_as_they_can_be(tokenizer):
    batches = tokenizer.encode_chunks(iter(["one", " ", "two", AssertionError]))
    assert next(batches) == tokenizer.encode("one")


def test_the_whitespace_of_the_split_is_unicodes():
    spaces = {chr(code) for code in range(0x110000) if module.re.fullmatch(f"[{SPACE}]", chr(code))}
    assert spaces == {chr(code) for code in range(0x110000) if chr(code).isspace()} - set("\x1c\x1d\x1e\x1f")


@pytest.mark.security
@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, "\u6f22" * 300_000, " " * 2_000_000 + "x", "\n" * 2_000_000 + "x", " " * 2_000_000],
    ids=["letters", "cjk", "spaces-then-x", "newlines-then-x", "spaces"],
)
def test_a_megabyte_without_a_word_break_is_encoded_in_seconds(tokenizer, text):
    started = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - started < 10  # 0.5 s here; a quadratic merge would take hours
    assert tokenizer.decode(ids) == text


def test_chunks_without_a_word_break_are_encoded_in_seconds(tokenizer):
    started = time.perf_counter()
    ids = [i for batch in tokenizer.encode_chunks(["ab" * 5000] * 100) for i in batch]
    assert time.perf_counter() - started < 10
    assert tokenizer.decode(ids) == "ab" * 500_000


# The two files


@pytest.mark.fault
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_an_altered_bpe_file_is_refused_by_name(bpe, tmp_path, name):
    folder = Path(shutil.copytree(bpe, tmp_path / "bpe"))
    altered = bytearray((folder / name).read_bytes())
    altered[len(altered) // 2] ^= 1
    (folder / name).write_bytes(altered)
    with pytest.raises(IntegrityError, match=rf"{name} is not GPT-2's .*dvc repro -f download") as caught:
        load_tokenizer(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_missing_bpe_file_is_named_with_the_command_that_fetches_it(bpe, tmp_path, name):
    folder = Path(shutil.copytree(bpe, tmp_path / "bpe"))
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} not found: run `dvc repro download`"):
        load_tokenizer(folder)


@pytest.mark.security
def test_loading_neither_writes_a_cache_nor_asks_the_network(bpe, tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(socket, "socket", None)
    load_tokenizer(bpe)
    assert list(tmp_path.iterdir()) == []
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    load_tokenizer(bpe)
    assert list(tmp_path.iterdir()) == []
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
