"""The tab Next token: the model's next-token probabilities beside the counts in the training text."""

import codecs
import math
from collections.abc import Sequence
from typing import Any

import gradio as gr
import torch

from pipeline.system.errors import InputError, PipelineError
from pipeline.system.words import counted
from webapp.events import event_options
from webapp.fields import MAX_PROMPT, checked_int, checked_prompt
from webapp.html import fault_slot, faults, html, note, status_html, visible
from webapp.model_source import Served
from webapp.page_version import PageVersion

SHOWN = 12
MAX_PART = 8  # tokens
APPEND = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-token]");
  if (!button || button.disabled) return;
  trigger("click", {token: Number(button.dataset.token), part: button.closest("table").dataset.part});
});
"""


def predict_next(served: Served, prompt: Any, most: int = SHOWN, part: Any = "") -> dict[str, Any]:
    """The response of /next_token, see webapp/api.py. Raises InputError."""
    ids = served.tokenizer.encode(checked_prompt(prompt)) + _checked_part(served, part)
    probabilities = served.generator.next_tokens(ids).double()  # (V,)
    length, following = served.corpus.following(ids)
    following = following if length else {}
    top = probabilities.topk(min(most, len(probabilities)))
    return {
        "model": served.label,
        "entropy_nats": float(torch.special.entr(probabilities).sum()),
        "tokens": [
            {
                "id": i,
                "text": _append(served, [], i)[0] or None,
                "bytes": served.tokenizer.decode_bytes([i]).hex(),
                "probability": probability,
                "times_in_text": following.get(i, 0),
            }
            for i, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        "context_tokens": length,
        "context_times": sum(following.values()),
    }


def next_token_tab(page: gr.Blocks, version: PageVersion) -> None:
    start = "".join(version.source.current().examples[:1])
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(start, label="Text so far", lines=5, max_lines=14, max_length=MAX_PROMPT,
                                elem_id="so-far")  # fmt: skip
            fault = fault_slot()
            go = gr.Button("Predict", variant="primary", elem_classes="go", elem_id="predict")
            html(
                note(
                    "Press a token to append it; \\x… is a byte of a character that takes several tokens. The "
                    "probabilities are the model's, at temperature 1; the grey bars show how often the training text "
                    "continues the same words with that token."
                )
            )
        with gr.Column(scale=3, min_width=300):
            shown = html(next_token_html(version.source.current(), start), js_on_load=APPEND, elem_id="next")

    def predict(prompt: Any, number: Any) -> tuple[str, ...]:
        try:
            return next_token_html(version.served(number), prompt), ""
        except PipelineError as error:
            return "", *faults(["prompt"], error)

    def append(
        prompt: Any, number: Any, event: gr.EventData
    ) -> tuple[Any, str, str]:  # Gradio finds `event` by its hint
        """Append the pressed token to the prompt, and predict the next one."""
        sent = event._data if isinstance(event._data, dict) else {}
        try:
            served = version.served(number)
            token = checked_int("token", sent.get("token"), 0, served.tokenizer.n_vocab - 1)
            text, part = _append(served, _checked_part(served, sent.get("part", "")), token)
            longer = checked_prompt(prompt) + text
            return longer, next_token_html(served, longer, part), ""
        except PipelineError as error:
            return gr.skip(), "", *faults(["prompt"], error)

    given = [prompt, version.number]
    # page.js presses it at each change of the text: Gradio's own event is only for keys, so not for a pasted text
    go.click(predict, given, [shown, fault], **event_options("read", trigger_mode="always_last"))
    shown.click(append, given, [prompt, shown, fault], **event_options("read"))
    version.number.change(predict, given, [shown, fault], **event_options("read"))


def next_token_html(served: Served, prompt: Any, part: Sequence[int] = ()) -> str:
    """A status line, and a table with a row for each token.

    `part`: tokens after `prompt` that are a part of a character.
    """
    sent = " ".join(map(str, part))
    found = predict_next(served, prompt, part=sent)
    tokens, entropy, times = found["tokens"], found["entropy_nats"], found["context_times"]
    status = status_html(
        f"entropy <b>{entropy / math.log(2):.2f}</b> bits",
        f"perplexity <b>{math.exp(entropy):,.1f}</b>",
        f"top {len(tokens)} together <b>{100 * sum(one['probability'] for one in tokens):.1f}%</b>",
    )
    head = '<tr><th>Token</th><th class="bars">Model, and training text in grey</th>'
    head += '<th class="number">Model</th><th class="number">Text</th></tr>'
    body = "".join(_line(served, one, times, part) for one in tokens)
    if part:
        words = "is a part of a character: a token continues it, Predict leaves it out"
        status += status_html(f"<b>{visible(served.tokenizer, part)}</b> {words}")
    table = f'<table class="info next" data-part="{sent}">{head}{body}</table>'
    ids = [*served.tokenizer.encode(checked_prompt(prompt)), *part]
    return f"{status}{table}{_context(served, ids, found)}"


def _line(served: Served, one: dict[str, Any], times: int, part: Sequence[int] = ()) -> str:
    name, p, n = visible(served.tokenizer, [one["id"]]), one["probability"], one["times_in_text"]
    disabled = "" if any(_append(served, part, one["id"])) else ' disabled title="cannot follow"'
    share = f'<div class="bar text" style="width:{100 * n / times:.2f}%"></div>' if n else ""
    return (
        f'<tr><td><button type="button" data-token="{one["id"]}"{disabled}>{name}</button>'
        f'</td><td class="bars"><div class="bar" style="width:{100 * p:.3f}%"></div>{share}</td>'
        f'<td class="number">{f"{100 * p:.1f}" if p >= 0.001 else f"{100 * p:.2g}"}%</td>'
        f'<td class="number">{f"{n:,} of {times:,}" if times else "–"}</td></tr>'
    )


def _context(served: Served, ids: list[int], found: dict[str, Any]) -> str:
    """The part of `ids` to which the grey bars refer."""
    if not found["context_times"]:
        return note("The last token does not occur in the training text, or ends it: there are no grey bars.")
    n = found["context_tokens"]
    data = served.tokenizer.decode_bytes(ids[-min(n, 12) :])
    words = data.decode("utf-8", errors="backslashreplace").replace("\n", "↵ ")
    whole = "all of your text" if n == len(ids) else "no longer context occurs there"
    limits = f" {served.corpus.limits}." if served.corpus.limits else ""
    return note(
        f"Context: “{'… ' if n > 12 else ''}{words}”, {counted(n, 'token')} ({whole}). The training text contains it "
        f"{times_in_words(found['context_times'])}.{limits}"
    )


def times_in_words(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n:,} times")


def _append(served: Served, part: Sequence[int], token: int) -> tuple[str, list[int]]:
    """Text of the tokens of `part` and `token`, or else these tokens, if they end within a character.

    Both are empty if the tokens are not UTF-8, or if `token` is the end of text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(served.tokenizer.decode_bytes([*part, token]))
    except UnicodeDecodeError:
        text = ""
    if token == served.tokenizer.eot:
        return "", []
    return ("", [*part, token]) if decoder.getstate()[0] else (text, [])


def _checked_part(served: Served, part: Any) -> list[int]:
    """Token ids, separated by spaces. Raises InputError."""
    ids = str(part).split()
    if len(ids) > MAX_PART:
        raise InputError(f"part has {len(ids)} tokens: give {MAX_PART} at most")
    return [
        checked_int("part", int(i) if i.isdecimal() and len(i) < 9 else i, 0, served.tokenizer.n_vocab - 1) for i in ids
    ]
