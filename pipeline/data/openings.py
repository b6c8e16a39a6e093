"""Openings of a text's own lines, as prompts."""

from collections.abc import Callable, Sequence

from pipeline.data.tokenizer import Tokenizer


def openings(
    read: Callable[[int, int], Sequence[int]], n_tokens: int, tokenizer: Tokenizer, n: int, n_characters: int
) -> list[str]:
    """At most `n` passages of at most `n_characters`: the beginning of the text, and lines evenly spread over it.

    `read`: the ids of the text from one position up to another. Where there is no line break, a passage begins with a
    word. It ends with a whole word if it has several.
    """
    found = []
    for begin in range(0, n_tokens, max(1, n_tokens // n)):
        ids = list(read(begin, min(n_tokens, begin + 4 * n_characters)))
        text = tokenizer.decode(ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids[1:] else ids)
        passage = text.lstrip("\n") if begin == 0 else text.partition("\n")[2].lstrip() or text.partition(" ")[2]
        cut = passage[: n_characters + 1]
        found.append((cut if cut == passage else cut[: max(map(cut.rfind, " \n"))]).rstrip()[:n_characters])
    return list(dict.fromkeys(filter(None, found)))[:n]
