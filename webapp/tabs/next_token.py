"""The tab Next token: the probabilities of the next token, beside what the training text has there."""

import math
from typing import Any

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


def expect(served: Served, prompt: Any, most: int = SHOWN) -> dict[str, Any]:
    """The answer of /next_token, see webapp/api.py. Raises InputError."""
    prompt = checked_prompt(prompt)
    probabilities = served.generator.next_tokens(prompt).double()  # (V,)
    length, following = served.corpus.following(served.tokenizer.encode(prompt))
    following = following if length else {}
    top = probabilities.topk(min(most, len(probabilities)))
    return {
        "model": served.label,
        "entropy_nats": float(torch.special.entr(probabilities).sum()),
        "tokens": [
            {"id": i, "text": _text(served, i), "probability": probability, "times_in_text": following.get(i, 0)}
            for i, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        "context_tokens": length,
        "context_times": sum(following.values()),
    }


def next_token_tab(page: gr.Blocks, source: Source) -> None:
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

    def predict(prompt: Any) -> str:
        with refusing():
            return expected_html(source.current(), prompt)

    def append(prompt: Any, event: gr.EventData) -> tuple[str, str]:  # Gradio finds the event by its hint
        """The prompt with the token that was pressed, and what may follow then."""
        served, sent = source.current(), event._data if isinstance(event._data, dict) else {}
        with refusing():
            token = checked_whole("token", sent.get("token"), 0, served.tokenizer.n_vocab - 1)
            longer = checked_prompt(prompt) + (_text(served, token) or "")
            return longer, expected_html(served, longer)

    go.click(predict, prompt, shown, **event_options("read"))
    prompt.input(predict, prompt, shown, **event_options("read", trigger_mode="always_last"))
    shown.click(append, prompt, [prompt, shown], **event_options("read"))


def expected_html(served: Served, prompt: Any) -> str:
    """Figures, then a line for each token: the token, its bars, its numbers."""
    found = expect(served, prompt)
    tokens, entropy, times = found["tokens"], found["entropy_nats"], found["context_times"]
    status = status_html(
        f"entropy <b>{entropy / math.log(2):.2f}</b> bits",
        f"perplexity <b>{math.exp(entropy):,.1f}</b>",
        f"top {len(tokens)} together <b>{100 * sum(one['probability'] for one in tokens):.1f}%</b>",
    )
    head = '<tr><th>Token</th><th class="bars">Model, and training text in grey</th>'
    head += '<th class="number">Model</th><th class="number">Text</th></tr>'
    body = "".join(_line(served, one, times) for one in tokens)
    return f'{status}<table class="info next">{head}{body}</table>{_context(served, prompt, found)}'


def _line(served: Served, one: dict[str, Any], times: int) -> str:
    name, p, n = visible(served.tokenizer, one["id"]), one["probability"], one["times_in_text"]
    share = f'<div class="bar text" style="width:{100 * n / times:.2f}%"></div>' if n else ""
    return (
        f'<tr><td><button type="button" data-token="{one["id"]}"{"" if one["text"] else " disabled"}>{name}</button>'
        f'</td><td class="bars"><div class="bar" style="width:{100 * p:.3f}%"></div>{share}</td>'
        f'<td class="number">{f"{100 * p:.1f}" if p >= 0.001 else f"{100 * p:.2g}"}%</td>'
        f'<td class="number">{f"{n:,} of {times:,}" if times else "–"}</td></tr>'
    )


def _context(served: Served, prompt: str, found: dict[str, Any]) -> str:
    """What the grey bars count."""
    if not found["context_times"]:
        return note("The training text has nothing after the last token: there are no grey bars.")
    n, ids = found["context_tokens"], served.tokenizer.encode(checked_prompt(prompt))
    words = served.tokenizer.decode(ids[-min(n, 12) :]).replace("\n", "↵ ")
    whole = "all of your text" if n == len(ids) else "no longer context occurs there"
    limits = f" {served.corpus.limits}." if served.corpus.limits else ""
    return note(
        f"Context: “{'… ' if n > 12 else ''}{words}”, {n:,} tokens ({whole}). Occurrences in the training text: "
        f"{found['context_times']:,}.{limits}"
    )


def _text(served: Served, token: int) -> str | None:
    if token == served.tokenizer.eot:
        return None  # the end of a document: no text follows it
    try:
        return served.tokenizer.decode_bytes([token]).decode("utf-8")
    except UnicodeDecodeError:
        return None
