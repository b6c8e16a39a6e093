"""next_token: the tab that shows what the model expects after some words, and what the training text has there."""

import math
from functools import partial
from html import escape
from typing import Any, NamedTuple

import gradio as gr
import torch

from pipeline.system.errors import PipelineError
from webapp.completion import LONGEST_PROMPT, checked_prompt, checked_whole
from webapp.html import html, note, refusal, visible
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
    times: int  # that the training text goes on so


class Expectation(NamedTuple):
    """What may follow a prompt."""

    likely: list[Likely]  # the likeliest first
    entropy: float  # nats
    context: list[int]  # the longest end of the prompt that stands in the training text
    n_prompt: int  # tokens of the whole prompt
    times: int  # that it stands there, with something after it


def expect(served: Served, prompt: Any, most: int = SHOWN) -> Expectation:
    """The `most` likeliest next tokens at temperature 1. Raises InputError."""
    prompt = checked_prompt(prompt)
    probabilities = served.generator.next_tokens(prompt).double()  # (V,)
    ids = served.tokenizer.encode(prompt)
    length, following = served.corpus.following(ids)
    top = probabilities.topk(min(most, len(probabilities)))
    likely = [
        Likely(token, _text(served, token), probability, following.get(token, 0) if length else 0)
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    entropy = float(torch.special.entr(probabilities).sum())
    return Expectation(likely, entropy, ids[len(ids) - length :], len(ids), sum(following.values()) if length else 0)


def next_token_tab(source: Source) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(START, label="Text so far", lines=5, max_lines=14, max_length=LONGEST_PROMPT,
                                elem_id="so-far")  # fmt: skip
            go = gr.Button("Look", variant="primary", elem_classes="go", elem_id="look")
            html(
                note(
                    "Press a token to append it and go on. The probabilities are the model's own, at temperature 1; "
                    "below each stands, in grey, what the training text has after the same words."
                )
            )
        with gr.Column(scale=3, min_width=300):
            shown = html(expected_html(source.current(), START), js_on_load=APPEND, elem_id="next")
    look = partial(_look, source)

    def append(prompt: Any, event: gr.EventData) -> tuple[str, str]:  # Gradio finds the event by its hint
        return _append(source, prompt, event)

    events: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "concurrency_id": "look"}
    events |= {"api_visibility": "private"}
    go.click(look, prompt, shown, **events)
    prompt.input(look, prompt, shown, trigger_mode="always_last", **events)
    shown.click(append, prompt, [prompt, shown], **events)


def _look(source: Source, prompt: Any) -> str:
    try:
        return expected_html(source.current(), prompt)
    except PipelineError as error:
        raise refusal(error) from None


def _append(source: Source, prompt: Any, event: gr.EventData) -> tuple[str, str]:
    """The prompt with the token that was pressed, and what may follow then."""
    served, sent = source.current(), event._data if isinstance(event._data, dict) else {}
    try:
        token = checked_whole("token", sent.get("token"), 0, served.tokenizer.n_vocab - 1)
        longer = checked_prompt(prompt) + (_text(served, token) or "")
        return longer, expected_html(served, longer)
    except PipelineError as error:
        raise refusal(error) from None


def expected_html(served: Served, prompt: Any) -> str:
    """Figures, then a row a token: the token, its bars, its numbers."""
    found = expect(served, prompt)
    known = 100 * sum(likely.probability for likely in found.likely)
    figures = (
        f'<dl class="figures"><div><dt>Entropy</dt><dd>{found.entropy / math.log(2):.2f} <small>bits</small></dd></div>'
        f"<div><dt>As undecided as among</dt><dd>{math.exp(found.entropy):,.1f} <small>equal tokens</small></dd></div>"
        f"<div><dt>Likeliest {len(found.likely)} together</dt><dd>{known:.1f}%</dd></div></dl>"
    )
    head = '<tr><th>Token</th><th class="bars">Model, and training text in grey</th>'
    head += '<th class="number">Model</th><th class="number">Text</th></tr>'
    rows = "".join(_row(served, likely, found.times) for likely in found.likely)
    return f'{figures}<table class="next"><thead>{head}</thead><tbody>{rows}</tbody></table>{_context(served, found)}'


def _row(served: Served, likely: Likely, times: int) -> str:
    name = visible(served.tokenizer, likely.token)
    share = f'<div class="bar text" style="width:{100 * likely.times / times:.2f}%"></div>' if likely.times else ""
    disabled = "" if likely.text else " disabled"
    return (
        f'<tr><td><button type="button" data-token="{likely.token}"{disabled}>{name}</button></td>'
        f'<td class="bars"><div class="bar" style="width:{100 * likely.probability:.3f}%"></div>{share}</td>'
        f'<td class="number">{_percent(likely.probability)}</td>'
        f'<td class="number">{f"{likely.times:,} of {times:,}" if times else "–"}</td></tr>'
    )


def _context(served: Served, found: Expectation) -> str:
    """What the grey bars count, in words."""
    if not found.times:
        return note("The last token stands nowhere in the training text with something after it: no grey bars.")
    words = escape(served.tokenizer.decode(found.context[-12:])).replace("\n", "↵ ")
    dots = "… " if len(found.context) > 12 else ""
    times = "once" if found.times == 1 else f"{found.times:,} times"
    n = len(found.context)
    subject = "All of your text" if n == found.n_prompt > 1 else "The last token" if n == 1 else f"The last {n} tokens"
    verb = "stands" if n in (1, found.n_prompt) else "stand"
    more = "" if n == found.n_prompt else " No longer end of your text does."
    more += f" {served.corpus.limits}." if served.corpus.limits else ""
    return f'<p class="note after">{subject} {verb} in the training text {times}: “{dots}{words}”.{more}</p>'


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f}%" if probability >= 0.001 else f"{100 * probability:.2g}%"


def _text(served: Served, token: int) -> str | None:
    if token == served.tokenizer.eot:
        return None  # the end of a document: no text goes on with it
    try:
        return served.tokenizer.decode_bytes([token]).decode("utf-8")
    except UnicodeDecodeError:
        return None
