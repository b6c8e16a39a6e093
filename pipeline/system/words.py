"""Words for messages, figures and the page."""


def counted(count: int, noun: str) -> str:
    """The count and the noun in its number: 1 token, 2 tokens."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
