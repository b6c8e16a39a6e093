"""Openings of lines: where they begin and end."""

import numpy as np
import pytest

from pipeline.data.openings import openings
from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    return make_tokenizer("bytes", tmp_path_factory.mktemp("bytes") / "tokenizer", [])


def found(text, tokenizer, n=3, characters=20):
    ids = tokenizer.encode_documents(text.encode()).astype(np.uint16)
    return openings(Tokens("text", [ids], tokenizer.n_vocab), tokenizer, n, characters)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two\nthree four\nfive six\nseven\n", ["One two\nthree four", "five six\nseven", "seven"]),
        ("It was a dark and stormy night.\n", ["It was a dark and", "and stormy night.", "night."]),  # one line
        ("no line breaks but words here all over", ["no line breaks but", "but words here all", "here all over"]),
        ("one line\0two line\0tri line\0", ["one line", "two line", "tri line"]),  # within a document
        ("A" * 50, ["A" * 20]),
        ("hé\n" * 9, ["\n".join(["hé"] * 7), "\n".join(["hé"] * 6), "\n".join(["hé"] * 3)]),  # no half of a character
        ("same\n" * 40, ["same\nsame\nsame\nsame"]),  # once
        ("", []),
    ],
)
def test_an_opening_begins_with_a_line_and_ends_with_a_word(text, expected, of_bytes):
    assert found(text, of_bytes) == expected


def test_every_opening_occurs_in_the_text(of_bytes):
    text = "".join(f"{i} day{i % 7}, and then more of it\n" for i in range(200))
    prompts = found(text, of_bytes, n=5)
    assert len(prompts) == 5
    assert prompts[0] == text[: len(prompts[0])]
    assert all(f"\n{prompt}" in f"\n{text}" and len(prompt) <= 20 for prompt in prompts)
