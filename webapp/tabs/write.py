"""write: the tab that continues a prompt, and shows which of it stands word for word in the training text."""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from gradio.events import Dependency

from pipeline.system.errors import InputError, PipelineError
from webapp.completion import LONGEST_PROMPT, MOST_SAMPLES, MOST_TOKENS, Writing, checked_whole, write
from webapp.html import LEAST_PASSAGE, html, note, place_html, refusal, traced
from webapp.model_source import Source

EXAMPLES = ("ROMEO:", "JULIET:", "First Citizen:\n", "First Citizen:\nBefore we proceed", "To be, or not to be")
LABELS = {
    "samples": "Samples", "max_tokens": "Length", "temperature": "Temperature", "top_k": "Top-k", "top_p": "Top-p",
    "repetition_penalty": "Repetition penalty", "seed": "Seed",
}  # fmt: skip
NUMBERS = tuple(LABELS)[1:]
NAMED = re.compile(rf"\b({'|'.join(LABELS)})\b")  # as the API calls them
EMPTY = '<p class="unwritten">What the model writes will stand here.</p>'
OPEN_PLACE = """
const open = (event) => {
  const mark = event.target.closest("[data-place]");
  if (!mark || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  element.querySelectorAll("mark.open").forEach((other) => other.classList.remove("open"));
  mark.classList.add("open");
  const {version, place, length} = mark.dataset;
  trigger("click", {version, place: Number(place), length: Number(length)});
};
element.addEventListener("click", open);
element.addEventListener("keydown", open);
"""  # what the marks of traced() do
SCROLL = "() => setTimeout(() => document.querySelector('{} .place')?.scrollIntoView({{block: 'nearest'}}), 60)"


def write_tab(source: Source) -> Dependency:
    """Lay the tab out and connect it; return the event of writing."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                "First Citizen:\n", label="Prompt", lines=4, max_lines=12, max_length=LONGEST_PROMPT, elem_id="prompt"
            )
            with gr.Row(elem_classes="chips"):
                for n, example in enumerate(EXAMPLES):
                    name = " ".join(example.split())
                    chip = gr.Button(name, size="sm", elem_id=f"example-{n}")
                    chip.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
            with gr.Row():
                go = gr.Button("Write", variant="primary", elem_classes="go", elem_id="write", min_width=120)
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
            numbers = _numbers()
            html(
                note(
                    "Ctrl+Enter writes, Esc stops. An empty prompt starts a text of its own. The model sees its last "
                    f"{source.current().generator.trained_length} tokens at most; what is longer slides out of sight. "
                    f"A prompt may have {LONGEST_PROMPT:,} characters."
                )
            )
        with gr.Column(scale=3, min_width=300):
            status = html("", elem_id="status")
            output = html(EMPTY, js_on_load=OPEN_PLACE, elem_id="written")
            place = html("", elem_id="place")
    started = go.click(
        partial(_written, source), [prompt, *numbers], [status, output, place], preprocess=False,
        show_progress="hidden", concurrency_id="model", api_visibility="private",
    )  # fmt: skip
    stop.click(None, None, None, cancels=[started], queue=False, api_visibility="private")
    connect_places(source, output, place, "#place")
    return started


def connect_places(source: Source, output: gr.HTML, place: gr.HTML, selector: str) -> None:
    """Have a press on a marked passage in `output` show, in `place`, the text around it."""

    def opened(event: gr.EventData) -> str:  # Gradio finds the event by its hint, not in a partial
        return _place(source, event)

    output.click(opened, None, place, show_progress="hidden", concurrency_id="look", api_visibility="private").then(
        None, None, None, js=SCROLL.format(selector)
    )


def _numbers() -> list[gr.components.Component]:
    """Samples first, then NUMBERS in their order."""
    samples = gr.Slider(1, MOST_SAMPLES, 1, step=1, label="Samples")
    length = gr.Slider(1, MOST_TOKENS, 200, step=1, label="Length, in tokens")
    temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0 always takes the likeliest token")
    with gr.Accordion("More", open=False):
        top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="draw from the likeliest so many; 0: from all")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="draw from the fewest that hold this probability")
        penalty = gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty", info="1: none")
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="the same seed writes the same text")
    return [samples, length, temperature, top_k, top_p, penalty, seed]


def _written(source: Source, prompt: Any, samples: Any, *numbers: Any) -> Iterator[tuple[str, str, str]]:
    """Status, samples and an empty place, again and again. Raises gr.Error for wrong input."""
    try:
        for writing in write(source.current(), prompt, samples, **dict(zip(NUMBERS, numbers, strict=True))):
            yield status_html(writing), samples_html(writing), ""
    except InputError as error:
        raise refusal(InputError(NAMED.sub(lambda name: LABELS[name[0]], str(error)))) from None
    except PipelineError as error:
        raise refusal(error) from None


def _place(source: Source, event: gr.EventData) -> str:
    """The training text around the passage that was pressed."""
    sent = event._data if isinstance(event._data, dict) else {}
    try:
        served = source.open(str(sent.get("version")))  # whose text it is: another one may be served by now
        place = checked_whole("place", sent.get("place"), 0, len(served.ids) - 1)
        length = checked_whole("length", sent.get("length"), 1, len(served.ids) - place)
    except PipelineError as error:
        raise refusal(error) from None
    return place_html(served, place, length)


def status_html(writing: Writing) -> str:
    """Speed, length and novelty of what is written, in words."""
    parts = [f"<b>{writing.n_tokens:,}</b> tokens", f"<b>{writing.tokens_per_s:,.0f}</b> tokens/s"]
    if writing.n_tokens:
        novelty = sum(writing.novelty(i) * len(ids) for i, ids in enumerate(writing.samples)) / writing.n_tokens
        parts.append(f"<b>{novelty:.0%}</b> new")
    line = "".join(f"<span>{part}</span>" for part in parts)
    return f'<p class="status" aria-live="off">{line}</p>'


def samples_html(writing: Writing) -> str:
    """Each sample on a sheet of its own, and what there is to say about them."""
    n = len(writing.samples)
    return (
        f'<div class="samples">{"".join(sample_html(writing, i) for i in range(n))}</div>'
        f"{_remarks(writing) if writing.finished else ''}"
    )


def sample_html(writing: Writing, i: int, title: str = "") -> str:
    text = traced(writing.served, writing.ids(i), len(writing.prompt_ids))
    state = "" if writing.finished else " writing"
    title = title or (f"Sample {i + 1}" if len(writing.samples) > 1 else "")
    head = (
        f"<header><b>{title}</b><span>seed {writing.seed + i}</span><span>{writing.novelty(i):.0%} new</span></header>"
    )
    return f'<article class="sheet">{head if title else ""}<p class="verse{state}">{text}</p></article>'


def _remarks(writing: Writing) -> str:
    """Captions in plain words: what the marks mean, and what the model had to go by."""
    words = (
        '<p class="note after">Marked passages stand word for word in the training text, for '
        f"{LEAST_PASSAGE} tokens or more: press one to see where. New means only that the words do not stand there "
        "in this order; it does not mean good.</p>"
    )
    if writing.prompt_ids and not writing.prompt_is_known:
        words += note("The training text does not have this prompt, so that nothing could be recited from it.")
    if writing.served.corpus.limits:
        words += note(f"{writing.served.corpus.limits}; what stands in the rest counts as new.")
    if writing.notice:
        words += note(f"{writing.notice[0].upper()}{writing.notice[1:]}.")
    return words
