"""The tab Write: complete a prompt, and mark what is copied from the training text."""

import json
from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from webapp.completion import MAX_PROMPT, MAX_SAMPLES, MAX_TOKENS, Completion, check_number, checked_int, complete
from webapp.html import event_options, html, marked_html, note, place_html, sheet, status_html, user_errors
from webapp.model_source import Source

CHIP = 24  # characters of an example that its button shows
NUMBERS = ("samples", "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
RANGES = {"samples": (1, MAX_SAMPLES), "max_tokens": (1, MAX_TOKENS), "temperature": (0, 2), "top_k": (0, 200),
          "top_p": (0.05, 1), "repetition_penalty": (0.5, 2)}  # of the sliders  # fmt: skip
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
"""  # for the marks of marked_html()
SCROLL = "() => setTimeout(() => document.querySelector('#{} .place')?.scrollIntoView({{block: 'nearest'}}), 60)"


def write_tab(page: gr.Blocks, source: Source) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            examples = source.current().examples
            prompt = gr.Textbox(
                "".join(examples[:1]), label="Prompt", lines=4, max_lines=12, max_length=MAX_PROMPT, elem_id="prompt"
            )
            with gr.Row(elem_classes="chips"):
                for n, example in enumerate(examples):
                    words = " ".join(example.split())
                    label = words if len(words) <= CHIP else f"{words[:CHIP]}…"
                    chip = gr.Button(label, size="sm", elem_id=f"example-{n}")
                    chip.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
            with gr.Row():
                go = gr.Button("Write", variant="primary", elem_classes="go", elem_id="write", min_width=120)
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
            numbers = _numbers()
            html(
                note(
                    "Ctrl+Enter writes, Esc stops. An empty prompt starts a new document. The model sees at most the "
                    f"last {source.current().generator.trained_length} tokens. A prompt may have {MAX_PROMPT:,} "
                    "characters."
                )
            )
        with gr.Column(scale=3, min_width=300):
            status = html("", elem_id="status")
            output = html(note("The completion appears here."), js_on_load=OPEN_PLACE, elem_id="written")
            place = html("", elem_id="place")
    shown = [status, output, place]
    started = go.click(partial(_written, source), [prompt, *numbers], shown, **event_options("model", status))
    stop.click(None, None, None, cancels=[started], queue=False, api_visibility="private")
    connect_places(source, output, place)


def connect_places(source: Source, output: gr.HTML, place: gr.HTML) -> None:
    """Show in `place` the training text around the pressed mark of `output`."""

    def opened(event: gr.EventData) -> str:  # Gradio finds the event by its hint, not in a partial
        sent = event._data if isinstance(event._data, dict) else {}
        with user_errors():
            served = source.open(str(sent.get("version")))  # the version that generated it may no longer be served
            begin = checked_int("place", sent.get("place"), 0, len(served.ids) - 1)
            length = checked_int("length", sent.get("length"), 1, len(served.ids) - begin)
            return place_html(served, begin, length)

    shown = output.click(opened, None, place, **event_options("read"))
    shown.then(None, None, None, js=SCROLL.format(place.elem_id))


def _numbers() -> list[gr.components.Component]:
    """A field for each of NUMBERS."""
    samples = gr.Slider(*RANGES["samples"], 1, step=1, label="Samples")
    length = gr.Slider(*RANGES["max_tokens"], 200, step=1, label="Max tokens")
    temperature = gr.Slider(
        *RANGES["temperature"], 0.8, step=0.05, label="Temperature", info="0: always the most likely token"
    )
    with gr.Accordion("More", open=False):
        top_k = gr.Slider(
            *RANGES["top_k"], 0, step=1, label="Top-k", info="sample from the k most likely tokens; 0: from all"
        )
        top_p = gr.Slider(*RANGES["top_p"], 1, step=0.05, label="Top-p", info="sample from the smallest set "
                          "whose probabilities add up to this; 1: from all")  # fmt: skip
        penalty = gr.Slider(*RANGES["repetition_penalty"], 1, step=0.05, label="Repetition penalty", info="1: none")
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="the same seed gives the same text")
    return [samples, length, temperature, top_k, top_p, penalty, seed]


def _written(source: Source, prompt: Any, *numbers: Any) -> Iterator[tuple[str, str, str]]:
    """Yield status, samples and an empty place as the text grows. Raises gr.Error for invalid input."""
    values = dict(zip(NUMBERS, numbers, strict=True))
    with user_errors():
        for name, (low, high) in RANGES.items():  # the field beside a slider accepts any number
            check_number(name, values[name], low, high)
        for completion in complete(source.current(), prompt, **values):
            yield _status(completion), samples_html(completion, source.trouble), ""


def _status(completion: Completion) -> str:
    """Version, length, speed and novelty."""
    n = completion.n_tokens
    parts = [escape(completion.served.label), f"<b>{n:,}</b> tokens", f"<b>{completion.tokens_per_s:,.0f}</b> tokens/s"]
    if n:
        novelty = sum(completion.novelty(i) * len(ids) for i, ids in enumerate(completion.samples)) / n
        parts.append(f"<b>{novelty:.0%}</b> new")
    return status_html(*parts)


def samples_html(completion: Completion, trouble: str | None = None) -> str:
    """A box for each sample, and notes once all are finished."""
    samples = "".join(sample_html(completion, i) for i in range(len(completion.samples)))
    return f'<div class="samples">{samples}</div>{_notes(completion, trouble) if completion.finished else ""}'


def sample_html(completion: Completion, i: int, title: str = "") -> str:
    text = marked_html(completion.served, completion.ids(i), len(completion.prompt_ids))
    title = title or (f"Sample {i + 1}" if len(completion.samples) > 1 else "")
    body = f'<p class="verse{"" if completion.finished else " writing"}">{text}</p>'
    return sheet(title, body, f"seed {completion.seed + i}", f"{completion.novelty(i):.0%} new")


def _notes(completion: Completion, trouble: str | None) -> str:
    """Notes on the marks and on the prompt."""
    corpus, prompt = completion.served.corpus, completion.prompt_ids
    words = note(trouble, "trouble") if trouble else ""
    words += note(
        f"Marked passages of {completion.served.min_passage} tokens or more are in the training text word for word: "
        "press one to see where. New means that the text does not contain these words in this order, not that they are "
        "good."
    )
    if prompt and corpus.following(prompt)[0] < len(prompt):
        words += note("The training text does not contain this prompt, so the model cannot recite what follows it.")
    if corpus.limits:
        words += note(f"{corpus.limits}; passages of the rest count as new.")
    if completion.notice:
        words += note(f"{completion.notice[0].upper()}{completion.notice[1:]}.")
    return words
