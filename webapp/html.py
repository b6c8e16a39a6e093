"""Render tokens and tables as HTML; every text is escaped here or by the caller."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import Any

import gradio as gr

from pipeline.data.corpus_index import Passage
from pipeline.data.tokenizer import CONTINUATION_BYTES, Tokenizer, whole_text
from pipeline.system.errors import PipelineError
from pipeline.system.words import encodable
from webapp.fields import FieldError
from webapp.model_source import Served

CONTEXT = 60  # tokens shown on either side of a passage
SPEAKER = re.compile(
    r"^[^\S\n]*\S+(?:[^\S\n]+\S+){0,3}:[^\S\n]*$", re.MULTILINE
)  # a line of up to four words and a colon


def split_text(tokenizer: Tokenizer, ids: Sequence[int], places: Iterable[int]) -> list[str]:
    """Split the text of `ids` before the tokens `places`; a character of several tokens stays with the first one.

    A part of a character at the start or end is left out, as in `Tokenizer.decode`.
    """
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    data, begins = b"".join(pieces), [0, *accumulate(map(len, pieces))]
    text = whole_text(data)
    start = len(data) - len(data.lstrip(CONTINUATION_BYTES))  # in `text`, each of these bytes is one U+FFFD
    cuts = (len(data[: begins[place]].decode("utf-8", errors="replace")) for place in places)
    return [text[begin:end] for begin, end in pairwise([start, *(max(start, cut) for cut in cuts), len(text)])]


def visible(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, with its whitespace and the bytes of a part of a character made visible."""
    text = escape(tokenizer.decode_bytes(ids).decode("utf-8", errors="backslashreplace"))
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(blank, f'<i class="blank">{sign}</i>')
    return text


def marked_html(served: Served, ids: Sequence[int], prompt_length: int, passages: Iterable[Passage]) -> str:
    """The text of `ids`, with a muted prompt and marks on copied passages; a click or a key opens a passage.

    `passages`: those of `ids` in the training text. The first of two overlapping marks has the shared tokens; a click
    shows all of each. A mark has at least `min_passage` tokens that are neither the prompt's, nor blank, nor of a line
    that names a speaker.
    """
    marks, end, telling = dict[int, Passage](), prompt_length, [*accumulate(_tells(served, ids), initial=0)]
    for passage in passages:
        begin = max(passage.begin, end)
        if passage.end > begin and telling[passage.end] - telling[begin] >= served.min_passage:
            marks[begin] = passage
            end = passage.end
    places = sorted({prompt_length, *marks, *(passage.end for passage in marks.values())})
    parts = []
    for start, text in zip([0, *places], split_text(served.tokenizer, ids, places), strict=True):
        if text and (copied := marks.get(start)):
            length, version = copied.end - copied.begin, escape(str(served.info["version"]))
            parts.append(
                f'<mark tabindex="0" role="button" data-version="{version}" data-place="{copied.position}" '
                f'data-length="{length}" title="{length} tokens of the training text: show them there">'
                f"{escape(text)}</mark>"
            )
        else:
            parts.append(f'<span class="prompt">{escape(text)}</span>' if start < prompt_length else escape(text))
    return "".join(parts)


def _tells(served: Served, ids: Sequence[int]) -> list[bool]:
    """Whether each token has letters of a line that does not only name a speaker, or signs of such a line."""
    pieces = split_text(served.tokenizer, ids, range(1, len(ids))) if len(ids) else []
    text = "".join(pieces)
    lines = [(found.start(), found.end()) for found in SPEAKER.finditer(text)]
    begins, told = [0, *accumulate(map(len, pieces))], []
    for piece, begin in zip(pieces, begins, strict=False):
        while lines and lines[0][1] <= begin:
            lines.pop(0)
        named = bool(lines) and lines[0][0] <= begin + len(piece) - len(piece.lstrip())
        told.append(bool(piece.strip()) and not named)
    return told


def place_html(served: Served, place: int, length: int) -> str:
    """The training text around the `length` tokens that start at token `place`."""
    start, stop = max(0, place - CONTEXT), min(len(served.ids), place + length + CONTEXT)
    ids = served.ids[start:stop].tolist()
    before, passage, after = split_text(served.tokenizer, ids, [place - start, place - start + length])
    n_text = served.corpus.n_text
    body = f'<span class="prompt">{escape(before)}</span><mark>{escape(passage)}</mark>'
    body = f'<p class="verse">{body}<span class="prompt">{escape(after)}</span></p>'
    return sheet("In the training text", body, where_html(place, n_text), kind="sheet place")


def where_html(place: int, n_text: int) -> str:
    """Where token `place` is in a text of `n_text` tokens, in words."""
    share = place / n_text
    if place == 0:
        return "at its beginning"
    if 0.005 <= share < 0.995:
        return f"after {share:.0%} of it, from token {place:,} on"
    return f"near its {'beginning' if share < 0.5 else 'end'}, from token {place:,} of {n_text:,} on"


def alias_words(aliases: Sequence[str]) -> str:
    """What the aliases of a version say, as a sentence; "" if it has none."""
    known = {"champion": "the champion, which is served by default", "candidate": "the newest one that was registered"}
    said = [known[alias] for alias in known if alias in aliases]
    for alias in sorted(set(aliases) - set(known)):
        rule = alias.removeprefix("champion-")
        said.append(
            f"the best one by the target rule “{rule}”" if rule != alias else f"the one with the alias “{alias}”"
        )
    return f"It is {', and '.join(said)}." if said else ""


def fault_slot() -> gr.HTML:
    """The place below a field where its error is shown."""
    return html("", elem_classes="fault-slot")


def faults(fields: Sequence[str], error: PipelineError | None = None) -> tuple[str, ...]:
    """HTML for the slot of each field: the error that is about it, else nothing.

    An error that is about none of them is shown below the first one.
    """
    at = error.field if isinstance(error, FieldError) and error.field in fields else fields[0]
    return tuple(fault_html(error) if error and field == at else "" for field in fields)


def fault_html(error: PipelineError) -> str:
    words = encodable(error.words if isinstance(error, FieldError) else str(error))
    return f'<p class="fault" role="alert">{escape(words[:1].upper() + words[1:], quote=False)}</p>'


def sheet(title: str, body: str, *details: str, kind: str = "sheet") -> str:
    """A box with an optional heading; `title` is escaped, the rest is HTML."""
    spans = "".join(f"<span>{detail}</span>" for detail in details)
    head = f"<header><b>{escape(title)}</b>{spans}</header>" if title else ""
    return f'<article class="{kind}">{head}{body}</article>'


def table(rows: Iterable[tuple[str, str]], kind: str = "") -> str:
    """A table of names and values, both HTML."""
    body = "".join(f'<tr><th>{name}</th><td class="number">{value}</td></tr>' for name, value in rows)
    return f'<table class="info {kind}">{body}</table>'


def status_html(*parts: str) -> str:
    """A status line; the parts are HTML."""
    return f'<p class="status" aria-live="off">{"".join(f"<span>{part}</span>" for part in parts)}</p>'


def heading(text: str) -> str:
    return f'<h2 class="part">{escape(text)}</h2>'


def note(text: str, kind: str = "note") -> str:
    """A caption."""
    return f'<p class="{kind}">{escape(text)}</p>'


def html(value: str = "", js_on_load: str | None = None, **options: Any) -> gr.HTML:
    """A gr.HTML component without Gradio's default style."""
    return gr.HTML(value, js_on_load=js_on_load, apply_default_css=False, **options)
