"""GPT-2's tokenizer: exact round trips, text that may be cut, and verified files."""

import re
import shutil
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from fixtures_tokenizer import _byte_tokenizer  # noqa: F401 (a fixture)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import tokenizer as module
from pipeline.data.tokenizer import BPE_SHA256, CUT, SPACE, fetch_tokenizer, load_tokenizer
from pipeline.system.errors import InputError, IntegrityError

# All that GPT-2's split depends on: spaces of several kinds, \x1c (a space for Python, not for Unicode), contractions.
hard_text = st.text("  \n\r\t\u00a0\u3000\x1c'srveLl1.-\u00e9\u6f22\U0001f600", max_size=60)
# Runs of the two whitespace characters that GPT-2 merges, so that a cut within a run changes the ids.
no_nul = st.characters(codec="utf-8", exclude_characters="\0")
runs = st.lists(st.sampled_from(["\n", "\n\n", "\u00a0", "\u00a0\u00a0", "x"]), max_size=6).map("".join)


def whole(tokenizer, text):
    """The ids that tiktoken itself gives for the text in one call."""
    return tokenizer._encoding.encode_ordinary(text)


@given(text=st.text() | hard_text)
def test_b5_any_text_is_decoded_to_itself(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_the_encoding_is_gpt2s(tokenizer):
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]  # known from GPT-2's own code
    assert tokenizer.encode("") == []
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    special = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in special
    assert tokenizer.decode(special) == "a<|endoftext|>b"


def test_what_is_not_a_character_becomes_a_replacement_character_but_for_parts_at_the_ends(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    first, *rest = tokenizer.encode("\U0001f600")
    assert tokenizer.decode([first]) == tokenizer.decode(rest) == ""
    a = tokenizer.encode("a")
    assert tokenizer.decode([*rest, *a, first, *a, *tokenizer.encode("\ufffd"), first]) == "a\ufffda\ufffd"
    assert tokenizer.decode_bytes([first]) + tokenizer.decode_bytes(rest) == "\U0001f600".encode()
    assert rest


# Encoding in parts


@given(
    texts=st.lists(hard_text | runs | st.text(no_nul, max_size=20) | st.just("<|endoftext|>"), min_size=1, max_size=4)
)
def test_documents_have_the_ids_of_each_text_alone_also_if_they_are_cut(tokenizer, texts):
    data = "\0".join(texts).encode()
    cuts = [0, *(found.start() for found in CUT.finditer(data)), len(data)]
    parts = [tokenizer.encode_documents(data[start:stop]) for start, stop in pairwise(cuts)]
    for ids in (tokenizer.encode_documents(data), np.concatenate(parts)):
        assert ids.dtype == np.uint16
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
        assert [ids[ids != tokenizer.eot].tolist() for ids in documents] == [whole(tokenizer, text) for text in texts]


@given(text=hard_text | runs)
def test_a_cut_in_long_whitespace_does_not_change_the_ids(tokenizer, text):
    shorter = module.LONG_SPACE.pattern.replace("1000", "1")  # so that short runs are cut too
    with patch.object(module, "LONG_SPACE", re.compile(shorter)):
        assert tokenizer.encode(text) == whole(tokenizer, text)


def test_the_whitespace_of_the_split_is_unicodes():
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    spaces = {char for char in characters if char.isspace()} - set("\x1c\x1d\x1e\x1f")
    assert set(re.findall(f"[{SPACE}]", characters)) == spaces
    assert {found.decode() for found in re.findall(module.SPACE_UTF8, characters.encode())} == spaces


@pytest.mark.parametrize(
    ("run", "n", "end"),
    [("a", 300_000, ""), ("\u6f22", 300_000, ""), (" ", 2_000_000, "x"), ("\n", 2_000_000, "x"), (" ", 2_000_000, "")],
)
def test_a_long_text_without_a_word_break_is_encoded(tokenizer, run, n, end):
    text = run * n + end  # a merge in quadratic time would take minutes, tiktoken's split overflows its stack
    assert tokenizer.decode(tokenizer.encode(text)) == text


# The files


@pytest.mark.parametrize("name", BPE_SHA256)
def test_an_altered_or_missing_bpe_file_is_named_with_the_command_that_fetches_it(bpe, tmp_path, name):
    shutil.copytree(bpe, folder := tmp_path / "bpe")
    altered = bytearray((folder / name).read_bytes())
    altered[len(altered) // 2] ^= 1
    (folder / name).write_bytes(altered)
    with pytest.raises(IntegrityError, match=rf"{name} is not GPT-2's .*dvc repro -f download_tokenizer") as caught:
        load_tokenizer(folder)
    assert caught.value.exit_code == 3
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} not found: run `dvc repro download_tokenizer`"):
        load_tokenizer(folder)


def test_files_that_are_there_are_kept_and_need_no_network(bpe, byte_tokenizer, tmp_path, monkeypatch):
    fetched = []

    def fetch(sources, path, sha256):
        fetched.append(path.name)
        shutil.copy(bpe / path.name, path)

    monkeypatch.setattr(module, "fetch", fetch)
    folder = tmp_path / "tokenizer"
    for _ in range(2):
        fetch_tokenizer("gpt2", folder)
    assert fetched == [*BPE_SHA256]
    (folder / "manifest.json").unlink()  # as after a copy by hand
    fetch_tokenizer("gpt2", folder)
    assert (len(fetched), (folder / "manifest.json").is_file()) == (2, True)
    for damage in (lambda: (folder / "vocab.bpe").write_text("x"), lambda: fetch_tokenizer("bytes", folder)):
        damage()
        fetched.clear()
        fetch_tokenizer("gpt2", folder)
        assert fetched == [*BPE_SHA256]


def test_a_tokenizer_is_found_by_its_files(bpe, byte_tokenizer, tmp_path):
    fetch_tokenizer("bytes", tmp_path / "tokenizer")
    assert [load_tokenizer(folder).name for folder in (bpe, tmp_path / "tokenizer")] == ["gpt2", "bytes"]
    with pytest.raises(InputError, match=r"corpus.tokenizer: unknown tokenizer 'byte' \(did you mean bytes\?\)"):
        fetch_tokenizer("byte", tmp_path / "tokenizer")
    with pytest.raises(InputError, match="contains no tokenizer: run `dvc repro download_tokenizer`"):
        load_tokenizer(tmp_path)
