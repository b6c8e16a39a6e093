"""Render tokens and tables as HTML; every text is escaped here or by the caller."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import accumulate, pairwise
from typing import Any

import gradio as gr

from pipeline.data.tokenizer import CONTINUATION_BYTES, Tokenizer, whole_length
from pipeline.system.errors import PipelineError
from webapp.model_source import Served

CONCURRENT = {"model": 16, "read": 2}  # requests of a queue at the same time; those to the model share a batch
CONTEXT = 60  # tokens shown on either side of a passage


@contextmanager
def user_errors(on_page: bool = True) -> Iterator[None]:
    """Turn a PipelineError into a gr.Error of one line without a traceback; on the page it is HTML."""
    try:
        yield
    except PipelineError as error:
        words = str(error).encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be encoded
        text = escape(words, quote=False) if on_page else words
        raise gr.Error(text, duration=8, print_exception=False, title="Not possible") from None


def event_options(queue: str, shown_on: gr.HTML | None = None, **options: Any) -> dict[str, Any]:
    """Options of an event of the page. `queue`: "model" for generation, "read" for fast requests.

    `shown_on`: the result on which a request in the queue shows its place.
    """
    private: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
    if shown_on:
        private |= {"show_progress": "minimal", "show_progress_on": shown_on}
    return private | {"concurrency_id": queue, "concurrency_limit": CONCURRENT[queue]} | options


def split_text(tokenizer: Tokenizer, ids: Sequence[int], places: Iterable[int]) -> list[str]:
    """Split the text of `ids` before the tokens `places`; a character of several tokens stays with the first one.

    A part of a character at the start or end is left out, as in `Tokenizer.decode`.
    """
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    data, begins = b"".join(pieces), [0, *accumulate(map(len, pieces))]
    text = data[: whole_length(data)].decode("utf-8", errors="replace")
    start = len(data) - len(data.lstrip(CONTINUATION_BYTES))  # in `text`, each of these bytes is one U+FFFD
    cuts = (len(data[: begins[place]].decode("utf-8", errors="replace")) for place in places)
    return [text[begin:end] for begin, end in pairwise([start, *(max(start, cut) for cut in cuts), len(text)])]


def visible(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, with its whitespace and the bytes of a part of a character made visible."""
    text = escape(tokenizer.decode_bytes(ids).decode("utf-8", errors="backslashreplace"))
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(blank, f'<i class="blank">{sign}</i>')
    return text


def marked_html(served: Served, ids: Sequence[int], prompt_length: int) -> str:
    """The text of `ids`, with a muted prompt and marks on copied passages; a click or a key opens a passage."""
    passages, end = {}, prompt_length
    for passage in served.corpus.passages(ids, served.min_passage):
        if passage.end > end:  # the first of two overlapping marks has the shared tokens; a click shows all of each
            passages[max(passage.begin, end)] = passage
            end = passage.end
    places = sorted({prompt_length, *passages, *(passage.end for passage in passages.values())})
    parts = []
    for start, text in zip([0, *places], split_text(served.tokenizer, ids, places), strict=True):
        if text and (copied := passages.get(start)):
            length, version = copied.end - copied.begin, escape(str(served.info["version"]))
            parts.append(
                f'<mark tabindex="0" role="button" data-version="{version}" data-place="{copied.position}" '
                f'data-length="{length}" title="{length} tokens of the training text: show them there">'
                f"{escape(text)}</mark>"
            )
        else:
            parts.append(f'<span class="prompt">{escape(text)}</span>' if start < prompt_length else escape(text))
    return "".join(parts)


def place_html(served: Served, place: int, length: int) -> str:
    """The training text around the `length` tokens that start at token `place`."""
    start, stop = max(0, place - CONTEXT), min(len(served.ids), place + length + CONTEXT)
    ids = served.ids[start:stop].tolist()
    before, passage, after = split_text(served.tokenizer, ids, [place - start, place - start + length])
    n_text = served.corpus.n_text
    body = f'<span class="prompt">{escape(before)}</span><mark>{escape(passage)}</mark>'
    body = f'<p class="verse">{body}<span class="prompt">{escape(after)}</span></p>'
    where = f"token {place:,} of {n_text:,} ({place / n_text:.0%})"
    return sheet("In the training text", body, where, kind="sheet place")


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
