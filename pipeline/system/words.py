"""Words for messages, figures and the page."""

import math

from pipeline.system.errors import InputError


def counted(count: int, noun: str) -> str:
    """The count and the noun in its number: 1 token, 2 tokens."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def in_words(number: float, unit: str) -> str:
    """A number of bits or bytes with an SI prefix, such as 6.3 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def encodable(text: str) -> str:
    """The text as an encoding takes it: a pair of surrogates becomes its character, a lone one U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def duration(seconds: float) -> str:
    """Seconds in words, such as 3 min."""
    for factor, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.{0 if seconds >= 10 * factor else 1}f} {unit}"
    return f"{seconds:.0f} s"


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `2h` or `1d`. Raises InputError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InputError(f"--time {text}: give a time such as 90s, 10m or 2h")
    return seconds
