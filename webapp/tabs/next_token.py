"""The tab Next token: the probabilities of the next token, beside what the training text has there."""

import math
from functools import partial
from typing import Any, NamedTuple

import gradio as gr
import torch

from webapp.completion import MAX_PROMPT, checked_prompt, checked_whole
from webapp.html import event_options, html, note, refusing, status_html, visible
from webapp.model_source import Served, Source

SHOWN = 12
START = "First Citizen:\nBefore we proceed any"
APPEND = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-token]");
  if (button && !button.disabled) trigger("click", {token: Number(button.dataset.token)});
});
"""


class Likely(NamedTuple):
    token: int
    text: str | None  # None: a part of a character, or the end of a document
    probability: float
    times: int  # that it follows the context in the training text


class Expectation(NamedTuple):
    """What may follow a prompt."""

    likely: list[Likely]  # the most likely first
    entropy: float  # nats
    context: list[int]  # the longest end of the prompt that the training text has
    n_prompt: int  # tokens of the whole prompt
    times: int  # that the text has the context, with something after it


def expect(served: Served, prompt: Any, most: int = SHOWN) -> Expectation:
    """The `most` likely next tokens at temperature 1. Raises InputError."""
    prompt = checked_prompt(prompt)
    probabilities = served.generator.next_tokens(prompt).double()  # (V,)
    ids = served.tokenizer.encode(prompt)
    length, following = served.corpus.following(ids)
    following = following if length else {}
    top = probabilities.topk(min(most, len(probabilities)))
    likely = [
        Likely(token, _text(served, token), probability, following.get(token, 0))
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    entropy = float(torch.special.entr(probabilities).sum())
    return Expectation(likely, entropy, ids[len(ids) - length :], len(ids), sum(following.values()))


def next_token_tab(page: gr.Blocks, source: Source) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(START, label="Text so far", lines=5, max_lines=14, max_length=MAX_PROMPT,
                                elem_id="so-far")  # fmt: skip
            go = gr.Button("Predict", variant="primary", elem_classes="go", elem_id="predict")
            html(
                note(
                    "Press a token to append it. The probabilities are the model's own, at temperature 1; the grey "
                    "bars show what the training text has after the same words."
                )
            )
        with gr.Column(scale=3, min_width=300):
            shown = html(expected_html(source.current(), START), js_on_load=APPEND, elem_id="next")

    def append(prompt: Any, event: gr.EventData) -> tuple[str, str]:  # Gradio finds the event by its hint
        return _append(source, prompt, event)

    predict = partial(_predict, source)
    go.click(predict, prompt, shown, **event_options("read"))
    prompt.input(predict, prompt, shown, **event_options("read", trigger_mode="always_last"))
    shown.click(append, prompt, [prompt, shown], **event_options("read"))


def _predict(source: Source, prompt: Any) -> str:
    with refusing():
        return expected_html(source.current(), prompt)


def _append(source: Source, prompt: Any, event: gr.EventData) -> tuple[str, str]:
    """The prompt with the token that was pressed, and what may follow then."""
    served, sent = source.current(), event._data if isinstance(event._data, dict) else {}
    with refusing():
        token = checked_whole("token", sent.get("token"), 0, served.tokenizer.n_vocab - 1)
        longer = checked_prompt(prompt) + (_text(served, token) or "")
        return longer, expected_html(served, longer)


def expected_html(served: Served, prompt: Any) -> str:
    """Figures, then a line for each token: the token, its bars, its numbers."""
    found = expect(served, prompt)
    known = 100 * sum(likely.probability for likely in found.likely)
    status = status_html(
        f"entropy <b>{found.entropy / math.log(2):.2f}</b> bits",
        f"perplexity <b>{math.exp(found.entropy):,.1f}</b>",
        f"top {len(found.likely)} together <b>{known:.1f}%</b>",
    )
    head = '<tr><th>Token</th><th class="bars">Model, and training text in grey</th>'
    head += '<th class="number">Model</th><th class="number">Text</th></tr>'
    body = "".join(_line(served, likely, found.times) for likely in found.likely)
    return f'{status}<table class="info next">{head}{body}</table>{_context(served, found)}'


def _line(served: Served, likely: Likely, times: int) -> str:
    name = visible(served.tokenizer, likely.token)
    share = f'<div class="bar text" style="width:{100 * likely.times / times:.2f}%"></div>' if likely.times else ""
    disabled, p = "" if likely.text else " disabled", likely.probability
    return (
        f'<tr><td><button type="button" data-token="{likely.token}"{disabled}>{name}</button></td>'
        f'<td class="bars"><div class="bar" style="width:{100 * p:.3f}%"></div>{share}</td>'
        f'<td class="number">{f"{100 * p:.1f}" if p >= 0.001 else f"{100 * p:.2g}"}%</td>'
        f'<td class="number">{f"{likely.times:,} of {times:,}" if times else "–"}</td></tr>'
    )


def _context(served: Served, found: Expectation) -> str:
    """What the grey bars count."""
    if not found.times:
        return note("The training text has nothing after the last token: there are no grey bars.", "note after")
    n = len(found.context)
    words = served.tokenizer.decode(found.context[-12:]).replace("\n", "↵ ")
    whole = "all of your text" if n == found.n_prompt else "no longer context occurs there"
    limits = f" {served.corpus.limits}." if served.corpus.limits else ""
    return note(
        f"Context: “{'… ' if n > 12 else ''}{words}”, {n:,} tokens ({whole}). Occurrences in the training text: "
        f"{found.times:,}.{limits}",
        "note after",
    )


def _text(served: Served, token: int) -> str | None:
    if token == served.tokenizer.eot:
        return None  # the end of a document: no text follows it
    try:
        return served.tokenizer.decode_bytes([token]).decode("utf-8")
    except UnicodeDecodeError:
        return None
