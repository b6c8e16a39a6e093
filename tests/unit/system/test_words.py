"""Numbers and times in words."""

import pytest

from pipeline.system.errors import InputError
from pipeline.system.words import duration, encodable, in_words, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)]
    + [(wrong, None) for wrong in ("", "m", "10x", "-5m", "0", "inf", "nan", "1e999")],
)
def test_a_time_has_a_unit(text, seconds):
    if seconds is None:
        with pytest.raises(InputError, match="give a time such as 90s, 10m or 2h"):
            parse_duration(text)
    else:
        assert parse_duration(text) == seconds


def test_seconds_in_words():
    assert [duration(s) for s in (0.4, 90, 119, 150, 3_000, 9_000, 400_000)] == [
        *("0 s", "90 s", "119 s"), *("2.5 min", "50 min", "2.5 h", "4.6 days")]  # fmt: skip


def test_any_text_can_be_encoded():
    for text in ("a\ud800", "\ud83d\ude00 🙂", "\udc80x", ""):
        encodable(text).encode()
    assert [encodable(text) for text in ("a\ud800b", "\ud83d\ude42", "é🙂")] == ["a\ufffdb", "🙂", "é🙂"]


def test_a_number_has_a_prefix_and_a_unit():
    assert [in_words(n, "B") for n in (12, 1_500, 6.3e6, 2e9)] == ["12 B", "1.5 kB", "6.3 MB", "2 GB"]
