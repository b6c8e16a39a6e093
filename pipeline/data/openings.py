"""Openings of a text's own lines, as prompts."""

import re

from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import Tokenizer

CHARACTERS = 40  # of an opening, at most
READ_TOKENS = 400  # for an opening: a longer line is opened in its middle
DOCUMENT_END = "\0"


def openings(tokens: Tokens, tokenizer: Tokenizer, n: int, characters: int = CHARACTERS) -> list[str]:
    """The beginning of the text, and openings of lines that are spread evenly over it; at most `n`, each one once.

    An opening has at most so many `characters`, and ends with a whole word if it has several. Where there is no line
    break, it begins with any word.
    """
    found = []
    for begin in range(0, len(tokens), max(1, len(tokens) // n)):
        start = max(0, begin - 1)  # the token before may end a line
        text = _decoded(tokens.read(start, min(len(tokens), begin + READ_TOKENS)).tolist(), tokenizer)
        passages = [text] if begin == 0 else [*re.split(r"[\n\0]\s*", text, maxsplit=1)[1:], *text.split(" ", 1)[1:]]
        passage = next(filter(str.strip, passages), "")
        found.append(_opening(passage.partition(DOCUMENT_END)[0], characters))
    return list(dict.fromkeys(filter(None, found)))[:n]


def _decoded(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of `ids`, with DOCUMENT_END between two documents."""
    documents, begin = [], 0
    for end in [*(i for i, each in enumerate(ids) if each == tokenizer.eot), len(ids)]:
        documents.append(tokenizer.decode(ids[begin:end]))
        begin = end + 1
    return DOCUMENT_END.join(documents)


def _opening(passage: str, characters: int) -> str:
    """The first words of `passage`."""
    cut = passage[: characters + 1]
    if len(cut) > characters:
        cut = cut[: max(map(cut.rfind, " \n"))]
    return cut.rstrip()[:characters]
