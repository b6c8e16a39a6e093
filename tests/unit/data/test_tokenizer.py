"""Tokenizers: exact round trips, text that may be cut, training, and verified files."""

import re
import shutil
from base64 import b64encode
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from fixtures_tokenizer import NAMES, POEM, _made, _utf8_tokenizer  # noqa: F401 (fixtures)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import tokenizer as module
from pipeline.data.tokenizer import (
    BPE_SHA256,
    PARTS_OF_LONG,
    SPACE,
    TOKENIZERS,
    WORDS,
    _even_sample,
    load_tokenizer,
    make_tokenizer,
    n_vocab_in,
    split_into,
)
from pipeline.system.errors import InputError, IntegrityError

# All that GPT-2's split depends on: spaces of several kinds, \x1c (a space for Python, not for Unicode), contractions.
hard_text = st.text("  \n\r\t\u00a0\u3000\x1c'srveLl1.-\u00e9\u6f22\U0001f600", max_size=60)
# Runs of the two whitespace characters that GPT-2 merges, so that a cut within a run changes the ids.
no_nul = st.characters(codec="utf-8", exclude_characters="\0")
runs = st.lists(st.sampled_from(["\n", "\n\n", "\u00a0", "\u00a0\u00a0", "x"]), max_size=6).map("".join)


def whole(tokenizer, text):
    """The ids that tiktoken itself gives for the text in one call."""
    return tokenizer._encoding.encode_ordinary(text)


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text() | hard_text | st.text(POEM, max_size=60))
def test_b5_any_text_is_decoded_to_itself(made, name, text):
    tokenizer = made(name)
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


def test_the_ids_of_bytes_and_characters_are_known(made):
    text, wide = "Kind 天😀Ω", sorted({char for char in POEM if ord(char) > 127})
    of_bytes, of_characters = made("bytes"), made("chars")
    assert of_bytes.encode(text) == list(text.encode())
    expected = [256 + wide.index(char) if char in wide else ord(char) for char in text[:-1]]
    assert of_characters.encode(text) == [*expected, *"Ω".encode()]  # which the poem lacks
    assert len(of_characters.encode(POEM)) == len(POEM)
    assert (of_bytes.n_vocab, of_bytes.eot) == (257, 256)
    assert (of_characters.n_vocab, of_characters.eot) == (257 + len(wide), 256 + len(wide))
    assert [made(name).name for name in NAMES] == [*NAMES]
    assert len({made(name).key for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_a_text_are_plain_text(made, name):
    tokenizer, text = made(name), "a<|endoftext|>b"
    assert tokenizer.eot not in tokenizer.encode(text)
    assert tokenizer.eot not in tokenizer.encode_documents(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_what_is_not_a_character_becomes_a_replacement_character_but_for_parts_at_the_ends(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    first, *rest = tokenizer.encode("\U0001f600")
    assert tokenizer.decode([first]) == tokenizer.decode(rest) == ""
    a = tokenizer.encode("a")
    assert tokenizer.decode([*rest, *a, first, *a, *tokenizer.encode("\ufffd"), first]) == "a\ufffda\ufffd"
    assert tokenizer.decode_bytes([first]) + tokenizer.decode_bytes(rest) == "\U0001f600".encode()
    assert rest


# Encoding in parts


@pytest.mark.parametrize("name", NAMES)
@given(
    texts=st.lists(
        hard_text | runs | st.text(no_nul, max_size=20) | st.text(POEM, max_size=30) | st.just("<|endoftext|>"),
        min_size=1,
        max_size=4,
    )
)
def test_documents_have_the_ids_of_each_text_alone_also_if_they_are_cut(made, name, texts):
    tokenizer, data = made(name), "\0".join(texts).encode()
    cuts = [0, *(found.start() for found in tokenizer.cut.finditer(data)), len(data)]
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
    with pytest.raises(IntegrityError, match=rf"{name} is not GPT-2's .*dvc repro -f tokenizer") as caught:
        load_tokenizer(folder)
    assert caught.value.exit_code == 3
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} not found: run `dvc repro tokenizer`"):
        load_tokenizer(folder)


def test_files_that_are_there_are_kept_and_need_no_network(bpe, tmp_path, monkeypatch):
    fetched = []

    def fetch(sources, path, sha256):
        fetched.append(path.name)
        shutil.copy(bpe / path.name, path)

    monkeypatch.setattr(module, "fetch", fetch)
    folder = tmp_path / "tokenizer"
    for _ in range(2):
        make_tokenizer("gpt2", folder, [])
    assert fetched == [*BPE_SHA256]
    (folder / "manifest.json").unlink()  # as after a copy by hand
    make_tokenizer("gpt2", folder, [])
    assert (len(fetched), (folder / "manifest.json").is_file()) == (2, True)
    for damage in (lambda: (folder / "vocab.bpe").write_text("x"), lambda: make_tokenizer("bytes", folder, [])):
        damage()
        fetched.clear()
        make_tokenizer("gpt2", folder, [])
        assert fetched == [*BPE_SHA256]


def test_a_tokenizer_is_found_by_its_files(bpe, utf8_tokenizer, tmp_path):
    make_tokenizer("utf8", folder := tmp_path / "tokenizer", [])
    assert [load_tokenizer(place).name for place in (bpe, folder)] == ["gpt2", "utf8"]
    assert [n_vocab_in(place) for place in (bpe, folder)] == [50257, 257]
    with pytest.raises(InputError, match=r"corpus.tokenizer: unknown tokenizer 'utf' \(did you mean utf8\?\)"):
        make_tokenizer("utf", folder, [])
    with pytest.raises(InputError, match=r"is utf8, corpus\.tokenizer is chars: run `dvc repro tokenizer`"):
        load_tokenizer(folder, "chars")
    with pytest.raises(InputError, match="contains no tokenizer: run `dvc repro tokenizer`"):
        load_tokenizer(tmp_path)


# Training


def test_training_gives_the_same_bytes_for_any_threads_and_blocks(tmp_path, monkeypatch):
    text = "".join(f"{i * i % 977:o} {POEM[i % 90 :][:40]}" for i in range(300))  # many pairs that are equally frequent
    words = [word.encode() for word in re.split(r"(?= )", text)]
    found = set()
    for parallel, blocks in (("false", [text.encode()]), ("true", words), ("true", words)):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        make_tokenizer("bpe:500", tmp_path / "tokenizer", blocks)
        found.add((tmp_path / "tokenizer" / "bpe.tiktoken").read_bytes())
    assert len(found) == 1


def test_of_a_long_text_an_even_sample_is_taken(tmp_path):
    blocks = [b"%03d" % n for n in range(100)]
    assert _even_sample(iter(blocks), 300) == blocks
    assert _even_sample(iter(blocks), 299) == blocks[::2]
    assert _even_sample(iter(blocks), 80) == blocks[::4]
    assert _even_sample([b"longer than the limit"], 3) == [b"longer than the limit"]
    with patch.object(module, "SAMPLE_BYTES", 12):
        tokenizer = make_tokenizer("bpe:258", tmp_path / "tokenizer", [b"xyxy ", b"aaaa "] * 9)
    assert tokenizer.decode_bytes([256]) == b"xy"


def test_merges_are_those_of_the_most_frequent_pairs_within_words_and_documents(tmp_path):
    tokenizer = make_tokenizer("bpe:260", tmp_path / "tokenizer", [b"low lower\0low newer", b" newer newest xy\0xy"])
    # "we" occurs four times; then "ewe" and "lo" three times, of which the first in the order of bytes comes first
    assert [tokenizer.decode_bytes([i]) for i in range(256, 259)] == [b"we", b"ewe", b"lo"]
    assert (tokenizer.n_vocab, tokenizer.eot) == (260, 259)
    with pytest.raises(InputError, match="has no more than 257 ids for bpe:258"):  # nothing is merged across a NUL
        make_tokenizer("bpe:258", tmp_path / "tokenizer", [b"x!\0!y\n" * 3])


def test_a_long_word_is_trained_on_in_parts_since_merging_takes_quadratic_time(tmp_path):
    split = split_into(WORDS, PARTS_OF_LONG)
    lengths = [len(piece) for piece, _ in split.pre_tokenize_str("acgt" * 1000 + " " * 2000 + "word, \u7532\n\n")]
    assert lengths == [1024, 1024, 1024, 928, 1024, 975, 5, 1, 4, 2]
    tokenizer = make_tokenizer("bpe:258", tmp_path / "tokenizer", [b"acgt" * 1000])
    assert len(tokenizer.encode("ac" * 5000)) == 5000  # text is encoded in whole words


def test_a_combining_mark_belongs_to_its_word(tmp_path):
    words = (" \u0628\u0650\u0633\u0652\u0645\u0650", " \u0915\u093f\u0924\u093e\u092c")  # Arabic, Hindi
    tokenizer = make_tokenizer("bpe:279", tmp_path / "tokenizer", ["".join(words * 9).encode()])
    assert [len(tokenizer.encode(word)) for word in words] == [1, 1]  # if marks cut words, there are 6 and 4 pieces


def test_a_text_with_too_few_pairs_or_too_many_characters_is_refused_and_the_old_tokenizer_kept(tmp_path):
    make_tokenizer("bytes", folder := tmp_path / "tokenizer", [])
    with pytest.raises(InputError, match=r"the training text has no more than 258 ids for bpe:300: set a smaller"):
        make_tokenizer("bpe:300", folder, [b"ab ab"])
    many = "".join(map(chr, [*range(0x80, 0xD800), *range(0x10000, 0x13000)]))
    with pytest.raises(InputError, match=r"has 67,456 characters beyond ASCII, chars has room for 65,279: use bpe:N"):
        make_tokenizer("chars", folder, [many.encode()])
    assert load_tokenizer(folder).name == "bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


BYTE_LINES = "".join(f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("bpe", ""),
        ("bpe", "\xff\n"),
        ("bpe", BYTE_LINES[:-9]),
        ("bpe", BYTE_LINES + "YWI= 257\n"),  # no id 256
        ("bpe", BYTE_LINES + "YWI= 256 1\n"),
        ("bpe", BYTE_LINES + "YWI= 256\nYWI= 257\n"),  # the same token twice
        ("bpe", BYTE_LINES + "YQ== 256\n"),
        ("chars", BYTE_LINES + "YWI= 256\n"),  # two characters
        ("bytes", BYTE_LINES + "w6k= 256\n"),
    ],
)
def test_a_file_that_is_not_a_tokenizers_is_refused(tmp_path, kind, content):
    (tmp_path / f"{kind}.tiktoken").write_text(content, encoding="latin-1")
    with pytest.raises(IntegrityError, match=f"{kind}.tiktoken is not a tokenizer's: .*dvc repro -f tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / f"{kind}.tiktoken").unlink()
    with pytest.raises(InputError, match=rf"{kind}.tiktoken not found: run `dvc repro tokenizer`"):
        next(each for each in TOKENIZERS.values() if each.files == (f"{kind}.tiktoken",)).load(tmp_path)
