import shutil
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from fixtures_tokenizer import _byte_tokenizer  # noqa: F401 (a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import tokenizer as module
from pipeline.data.tokenizer import CUT, SPACE, fetch_tokenizer, load_tokenizer
from pipeline.system.errors import InputError, IntegrityError

quickly = settings(max_examples=50, deadline=None)
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
@given(text=hard_text | runs | st.text(st.characters(codec="utf-8"), max_size=20))
def test_text_that_is_cut_where_it_may_be_encodes_as_the_whole_does(tokenizer, text):
    data = text.replace("\0", "").encode()
    cuts = [0, *(found.start() for found in CUT.finditer(data)), len(data)]
    ids = [i for start, stop in pairwise(cuts) for i in tokenizer.encode_documents(data[start:stop]).tolist()]
    assert ids == whole(tokenizer, data.decode())


@quickly
@given(texts=st.lists(hard_text | runs | st.just("<|endoftext|>"), min_size=1, max_size=4))
def test_between_two_documents_stands_the_end_of_text_and_nowhere_else(tokenizer, texts):
    ids = tokenizer.encode_documents("\0".join(texts).encode())
    assert ids.dtype == np.uint16
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    assert [tokenizer.decode(part[part != tokenizer.eot].tolist()) for part in documents] == texts
    assert [part[part != tokenizer.eot].tolist() for part in documents] == [whole(tokenizer, text) for text in texts]


def test_a_document_may_be_cut_off_before_its_boundary_but_not_in_the_space_before_it():
    assert [found.start() for found in CUT.finditer("one\u00a0\u00a0\0two".encode())] == [7]


@quickly
@given(text=hard_text | runs)
def test_a_cut_in_long_whitespace_changes_nothing(tokenizer, text):
    shorter = module.LONG_SPACE.pattern.replace("1000", "1")  # so that it cuts at all
    with patch.object(module, "LONG_SPACE", module.re.compile(shorter)):
        assert tokenizer.encode(text) == whole(tokenizer, text)


def test_the_whitespace_of_the_split_is_unicodes():
    spaces = {chr(code) for code in range(0x110000) if module.re.fullmatch(f"[{SPACE}]", chr(code))}
    assert spaces == {chr(code) for code in range(0x110000) if chr(code).isspace()} - set("\x1c\x1d\x1e\x1f")
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert spaces == {char for char in characters if module.re.fullmatch(module.SPACE_UTF8, char.encode())}


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


def test_a_tokenizer_is_found_by_its_files(bpe, byte_tokenizer, tmp_path):
    fetch_tokenizer("bytes", tmp_path / "tokenizer")
    assert [load_tokenizer(folder).name for folder in (bpe, tmp_path / "tokenizer")] == ["gpt2", "bytes"]
    with pytest.raises(InputError, match=r"corpus.tokenizer: unknown tokenizer 'byte' \(did you mean bytes\?\)"):
        fetch_tokenizer("byte", tmp_path / "tokenizer")
    with pytest.raises(InputError, match="holds no tokenizer: run `dvc repro download`"):
        load_tokenizer(tmp_path)
