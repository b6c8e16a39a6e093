"""prose: tokens -> HTML that shows them as text, marked by where they come from; everything is escaped here."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import gradio as gr

from pipeline.data.corpus_index import Passage
from pipeline.data.tokenizer import Tokenizer
from pipeline.system.errors import PipelineError
from webapp.model_source import Served

LEAST_PASSAGE = 8  # tokens that stand together in the training text before they count as taken from it
AROUND = 60  # tokens shown on either side of a place


def refusal(error: PipelineError, on_page: bool = True) -> gr.Error:
    """What the page, which takes it for HTML, and the API say to wrong input: one line, and no traceback anywhere."""
    words = str(error).encode("utf-8", "replace").decode("utf-8")  # it may quote a lone surrogate, which cannot be sent
    return gr.Error(
        escape(words, quote=False) if on_page else words, duration=8, print_exception=False, title="Not possible"
    )


def cut(tokenizer: Tokenizer, ids: Sequence[int], places: Sequence[int]) -> list[str]:
    """Text of `ids`, cut before the tokens `places`; a character that is split over tokens goes with its first."""
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    text, ends = b"".join(pieces), [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    cuts = [0, *(ends[place] for place in places), len(text)]
    for n, offset in enumerate(cuts):
        while 0 < offset < len(text) and text[offset] & 0xC0 == 0x80:  # within a character
            offset += 1
        cuts[n] = offset
    return [text[start:stop].decode("utf-8", errors="replace") for start, stop in pairwise(cuts)]


def visible(tokenizer: Tokenizer, token: int) -> str:
    """A token on its own, as HTML, its blanks to be seen."""
    raw = tokenizer.decode_bytes([token])
    try:
        text = escape(raw.decode("utf-8"))
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in raw)
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(blank, f'<i class="blank">{sign}</i>')
    return text


def traced(served: Served, ids: Sequence[int], prompt_length: int) -> str:
    """The text of `ids`: the prompt muted, what stands in the training text marked, to be opened by click or key."""
    marks, marked = [], prompt_length
    for passage in served.corpus.passages(ids, LEAST_PASSAGE):
        if passage.end > marked:  # where two overlap the first has the mark, and each opens as a whole
            marks.append((max(passage.begin, marked), passage.end, passage))
            marked = passage.end
    places = sorted({prompt_length, *(place for begin, end, _ in marks for place in (begin, end))})
    opened = {begin: passage for begin, _, passage in marks}
    parts = []
    for start, text in zip([0, *places], cut(served.tokenizer, ids, places), strict=True):
        if text and start in opened and start >= prompt_length:
            parts.append(_mark(opened[start], text, str(served.facts["version"])))
        else:
            parts.append(f'<span class="prompt">{escape(text)}</span>' if start < prompt_length else escape(text))
    return "".join(parts)


def _mark(passage: Passage, text: str, version: str) -> str:
    length = passage.end - passage.begin
    return (
        f'<mark tabindex="0" role="button" data-version="{escape(version)}" data-place="{passage.place}" '
        f'data-length="{length}" '
        f'title="stands in the training text, {length} tokens: open the place">{escape(text)}</mark>'
    )


def place_html(served: Served, place: int, length: int) -> str:
    """The training text around `length` tokens from `place` on."""
    start, stop = max(0, place - AROUND), min(len(served.ids), place + length + AROUND)
    ids = served.ids[start:stop].tolist()
    before, passage, after = cut(served.tokenizer, ids, [place - start, place - start + length])
    n_text = served.corpus.n_text
    return (
        '<section class="place" tabindex="-1" aria-label="Place in the training text">'
        f"<header><h3>Where it stands</h3><span>token {place:,} of {n_text:,}, {place / n_text:.0%} into the "
        f'training text</span></header><p class="verse"><span class="around">{escape(before)}</span>'
        f'<mark>{escape(passage)}</mark><span class="around">{escape(after)}</span></p></section>'
    )


def html(value: str = "", js_on_load: str | None = None, **options: Any) -> gr.HTML:
    """A piece of the page whose looks are our style sheet's alone."""
    return gr.HTML(value, js_on_load=js_on_load, apply_default_css=False, **options)


def note(text: str, kind: str = "note") -> str:
    """A caption in plain words."""
    return f'<p class="{kind}">{escape(text)}</p>'
