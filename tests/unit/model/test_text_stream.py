"""Text that comes in pieces: whole characters at once, and a stop text never."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.generator import TextStream


def written(text_stream, chunks):
    return [text_stream.add(chunk, last=i == len(chunks) - 1) for i, chunk in enumerate(chunks)]


def test_a_character_that_is_split_is_shown_whole():
    assert written(TextStream(), [b"\xf0\x9f", b"\x8e", b"\xad!"]) == ["", "", "🎭!"]


def test_bytes_that_are_no_character_are_shown_as_replaced():
    assert written(TextStream(), [b"a\xff", b"b\xf0\x9f"]) == ["a�", "b�"]


def test_the_text_ends_before_the_first_stop_text():
    stream = TextStream(["END", "\n\n"])
    assert written(stream, [b"one\n", b"\ntwo", b"END"]) == ["one", "", ""]
    assert stream.stopped


def test_what_may_begin_a_stop_text_is_held_until_it_does_not():
    stream = TextStream(["\nROMEO:"])
    assert written(stream, [b"x\nRO", b"ME", b"S y\n"]) == ["x", "", "\nROMES y\n"]
    assert not stream.stopped


def test_an_empty_stop_text_stops_nothing():
    assert written(TextStream([""]), [b"abc"]) == ["abc"]


@given(st.text(), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=3), st.integers(1, 5))
def test_pieces_join_to_the_text_before_the_first_stop_text(text, stop, size):
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    first = min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))
    assert "".join(written(TextStream(stop), chunks)) == text[:first]
