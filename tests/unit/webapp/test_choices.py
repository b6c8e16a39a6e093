"""The choices of OpenAI's answer: where each token begins in the text."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.tokenizer import SINGLE_BYTES, ByteTokenizer, whole_length, whole_text
from pipeline.model.generator import Piece, TextStream, TokenLogprob
from webapp.engine import Scores
from webapp.openai_api import choices
from webapp.openai_api.choices import Choice


def offsets(tokenizer, ids):
    choice = Choice(0, tokenizer, tokenizer.decode(i for i in ids if i != tokenizer.eot), reports=True)
    choice.add(Scores(0, [TokenLogprob(i, -1.0) for i in ids]))
    choice.add(Piece(0, [], "", "length", None))
    return choice.take()["logprobs"]["text_offset"]


def test_a_token_begins_after_the_whole_characters_before_it(tokenizer):
    text = "aé☃🙂é\n"
    ids = [tokenizer.eot, *(tokenizer.encode(text)), tokenizer.eot, *tokenizer.encode("b")]
    bytes_before = [tokenizer.decode_bytes(i for i in ids[:n] if i != tokenizer.eot) for n in range(len(ids))]
    assert offsets(tokenizer, ids) == [len(data.decode("utf-8", errors="ignore")) for data in bytes_before]


def test_a_token_after_a_prompt_that_ends_within_a_character_begins_where_its_text_does(tokenizer):
    ids = tokenizer.encode("a🐱b")  # the cat has three tokens
    for n_prompt in range(1, len(ids)):
        prompt, new, stream = ids[:n_prompt], ids[n_prompt:], TextStream()
        choice = Choice(0, tokenizer, whole_text(tokenizer.decode_bytes(prompt)), reports=True)
        choice.add(Scores(0, [TokenLogprob(i, -1.0) for i in prompt]))
        for n, i in enumerate(new, 1):
            text = stream.add(tokenizer.decode_bytes([i]), last=n == len(new))
            choice.add(Piece(0, [i], text, "length" if n == len(new) else None, None, (TokenLogprob(i, -1.0),)))
        answer = choice.take()
        assert answer["text"][answer["logprobs"]["text_offset"][-1] :] == "b"


@settings(max_examples=100)
@given(st.binary(min_size=1, max_size=8))
@example(b"a\xff\xff")
@example(b"\xed\xa0")  # the beginning of a surrogate
def test_bytes_that_are_no_text_have_their_place_in_it(data):
    tokenizer, stream = ByteTokenizer("bytes", {byte: rank for rank, byte in enumerate(SINGLE_BYTES)}), TextStream()
    choice = Choice(0, tokenizer, None, reports=True)
    for n, byte in enumerate(data, 1):
        text = stream.add(bytes([byte]), last=n == len(data))
        finish = "length" if n == len(data) else None
        choice.add(Piece(0, [byte], text, finish, None, (TokenLogprob(byte, -1.0),)))
    answer = choice.take()
    assert answer["text"] == whole_text(data)
    begins = [len(data[:n].decode("utf-8", "replace")) - 1 for n in range(1, len(data) + 1)]
    assert answer["logprobs"]["text_offset"] == begins  # the last one is beyond the text if a character is cut
    assert data.decode("utf-8", "replace") in (answer["text"], answer["text"] + "�")


def test_a_long_prompt_is_decoded_once(tokenizer, monkeypatch):
    (longest,) = tokenizer.encode("-" * 64)
    sizes = []
    monkeypatch.setattr(choices, "whole_length", lambda data: sizes.append(len(data)) or whole_length(data))
    assert offsets(tokenizer, [longest] * 1000) == list(range(0, 64_000, 64))
    assert sum(sizes) == 64_000  # if each token decodes all before it, it is 500 times that
