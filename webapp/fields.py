"""Check the values of the page's fields and of API calls, and name the field whose value is invalid."""

import secrets
from typing import Any

from pipeline.system.errors import InputError
from pipeline.system.words import encodable

MAX_PROMPT = 10_000  # characters
MAX_SEED = 2**31 - 1  # on the page; a browser's numbers are exact
DRAWN_SEEDS = 1_000_000  # of few digits, so that they can be noted down


class FieldError(InputError):
    """A value of the field `field` is invalid; `words` say why without naming it."""

    def __init__(self, message: str, field: str, words: str) -> None:
        super().__init__(message)
        self.field, self.words = field, words


def checked_prompt(prompt: Any) -> str:
    """A prompt of at most MAX_PROMPT characters; a lone surrogate becomes U+FFFD. Raises InputError."""
    if not isinstance(prompt, str):
        words = f"{str(prompt)[:40]!r}: it should be text"
        raise FieldError(f"prompt {words}", "prompt", words)
    if len(prompt) > MAX_PROMPT:
        words = f"the prompt has {len(prompt):,} characters: give {MAX_PROMPT:,} at most"
        raise FieldError(words, "prompt", words)
    return encodable(prompt)


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Raises FieldError unless `value` is a number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not number or (whole and value % 1 != 0):
        kind = "whole number" if whole else "number"
        hint = f"choose a {kind} from {low:,} to {high:,}"
        words = f"{'empty' if value in (None, '') else str(value)[:40]}: {hint}"
        raise FieldError(f"{name} {str(value)[:40]}: {hint}", name, words)


def checked_int(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises InputError."""
    check_number(name, value, low, high, whole=True)
    return int(value)


def chosen_seed(keep: Any, seed: Any) -> int:
    """The seed of the next text: `seed` if it is kept, else a new one. Raises FieldError."""
    return checked_int("seed", seed, 0, MAX_SEED) if keep else secrets.randbelow(DRAWN_SEEDS)
