"""The tab Write: complete a prompt, and mark what is copied from the training text."""

from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from pipeline.system.errors import PipelineError
from pipeline.system.words import counted
from webapp.completion import MAX_SAMPLES, MAX_TOKENS, Completion, complete
from webapp.events import event_options
from webapp.fields import MAX_PROMPT, MAX_SEED, FieldError, check_number, checked_int, chosen_seed
from webapp.html import fault_html, fault_slot, faults, html, marked_html, note, place_html, sheet, status_html
from webapp.model_source import Served
from webapp.page_version import PageVersion

CHIP = 24  # characters of an example that its button shows
NUMBERS = ("samples", "max_tokens", "temperature", "seed", "top_k", "top_p", "repetition_penalty")
FIELDS = ("prompt", *NUMBERS)
MORE = ("top_k", "top_p", "repetition_penalty")  # under a heading that opens
RANGES = {"samples": (1, MAX_SAMPLES), "max_tokens": (1, MAX_TOKENS), "temperature": (0, 2), "top_k": (0, 200),
          "top_p": (0.05, 1), "repetition_penalty": (0.5, 2)}  # of the sliders  # fmt: skip
OPEN_PLACE = """
const open = (event) => {
  if (event.target.closest(".beside")) return;
  const mark = event.target.closest("[data-place]");
  if (!mark || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  const again = mark.classList.contains("open");
  element.querySelectorAll("mark.open").forEach((other) => other.classList.remove("open"));
  element.querySelectorAll(".beside").forEach((box) => box.remove());
  if (again) return;
  mark.classList.add("open");
  if (mark.box) return mark.closest(".sheet").append(mark.box);
  const sheet = mark.closest(".sheet"), top = sheet.getBoundingClientRect().top;
  mark.dataset.below = (event.type === "click" ? event.clientY + 16 : mark.getClientRects()[0].bottom + 4) - top;
  const {version, place, length} = mark.dataset;
  trigger("click", {version, place: Number(place), length: Number(length), press: Date.now()});
};
element.addEventListener("click", open);
element.addEventListener("keydown", open);
"""  # for the marks of marked_html()
SHOW_PLACE = """
new MutationObserver(() => {
  const found = element.querySelector("[data-press]"), mark = document.querySelector("#OUTPUT mark.open");
  if (!found || !mark || mark.closest(".sheet").querySelector(".beside")) return;
  const box = Object.assign(document.createElement("div"), {className: "beside", tabIndex: -1});
  box.innerHTML = '<button type="button" aria-label="Close">×</button>' + found.innerHTML;
  box.querySelector("button").addEventListener("click", () => {
    mark.classList.remove("open"); box.remove(); mark.focus({preventScroll: true});
  });
  box.style.top = `${mark.dataset.below}px`;
  mark.box = box;
  mark.closest(".sheet").append(box);
  const passage = box.querySelector("mark"), page = box.getBoundingClientRect();
  box.scrollTop = Math.max(0, passage.getBoundingClientRect().top - page.top - 60);
  if (page.bottom > innerHeight) box.scrollIntoView({block: "nearest"});
}).observe(element, {childList: true, subtree: true});
"""  # opens what opened() answers next to the pressed mark of OUTPUT
PRESS_EXAMPLE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) { document.chosenExample = button.dataset.text; trigger("click"); }
});
"""


def write_tab(page: gr.Blocks, version: PageVersion) -> None:
    served = version.source.current()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            start = "".join(served.examples[:1])
            prompt = gr.Textbox(start, label="Prompt", lines=4, max_lines=12, max_length=MAX_PROMPT, elem_id="prompt")
            slots = [fault_slot()]
            chips = html(chips_html(served), js_on_load=PRESS_EXAMPLE)
            with gr.Row():
                go = gr.Button("Write", variant="primary", elem_classes="go", elem_id="write", min_width=120)
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
            numbers, keep, more = _numbers(slots)
            seed, hint = numbers[NUMBERS.index("seed")], html(_hint(served))
        with gr.Column(scale=3, min_width=300):
            status = html("", elem_id="status")
            output = html(note("The completion appears here."), js_on_load=OPEN_PLACE, elem_id="written")
            place = place_slot("written")
    shown = [status, output, place, more, seed, *slots]
    options = event_options("model", status)
    started = go.click(partial(_written, version), [prompt, *numbers, keep, version.number], shown, **options)
    stop.click(None, None, None, cancels=[started], queue=False, api_visibility="private")
    chips.click(None, None, prompt, js="() => document.chosenExample", api_visibility="private")
    prompt.change(None, None, None, js=PROMPT_CHANGED, api_visibility="private")
    connect_places(version, output, place)
    version.renders(lambda served: (chips_html(served), _hint(served)), chips, hint)


PROMPT_CHANGED = "() => { document.dispatchEvent(new Event('input')); }"  # page.js marks the text of another prompt


def chips_html(served: Served) -> str:
    """A button for each example, which sets the prompt."""
    buttons = ""
    for n, example in enumerate(served.examples):
        words = " ".join(example.split())
        label = words if len(words) <= CHIP else f"{words[:CHIP]}…"
        buttons += f'<button type="button" id="example-{n}" data-text="{escape(example)}">{escape(label)}</button>'
    return f'<div class="chips">{buttons}</div>'


def _hint(served: Served) -> str:
    return note(
        f"Ctrl+Enter writes, Esc stops. An empty prompt starts a new document. The model sees at most the last "
        f"{served.generator.trained_length} tokens. A prompt may have {MAX_PROMPT:,} characters."
    )


def place_slot(output_id: str) -> gr.HTML:
    """A hidden part that receives the place of a pressed mark of `output_id`, and opens it next to the mark."""
    shown = SHOW_PLACE.replace("OUTPUT", output_id)
    return html("", js_on_load=shown, elem_id=f"{output_id}-place", visible="hidden")


def connect_places(version: PageVersion, output: gr.HTML, place: gr.HTML) -> None:
    """Answer in `place` with the training text around the pressed mark of `output`."""

    def opened(event: gr.EventData) -> str:  # Gradio finds the event by its hint, not in a partial
        sent = event._data if isinstance(event._data, dict) else {}
        press = escape(str(sent.get("press"))[:20])  # of the press, so that no two answers are equal
        try:
            served = version.source.open(str(sent.get("version")))  # the one that wrote it may no longer be served
            begin = checked_int("place", sent.get("place"), 0, len(served.ids) - 1)
            length = checked_int("length", sent.get("length"), 1, len(served.ids) - begin)
            return f'<div data-press="{press}">{place_html(served, begin, length)}</div>'
        except PipelineError as error:
            return f'<div data-press="{press}">{fault_html(error)}<mark></mark></div>'

    output.click(opened, None, place, **event_options("read"))


def _numbers(slots: list[gr.HTML]) -> tuple[list[gr.components.Component], gr.Checkbox, gr.Accordion]:
    """A field for each of NUMBERS, whether the seed is kept, and where MORE are; appends the slot of each error."""

    def slider(name: str, start: float, step: float, **options: Any) -> gr.Slider:
        field = gr.Slider(*RANGES[name], start, step=step, **options)
        slots.append(fault_slot())
        return field

    numbers = [
        slider("samples", 1, 1, label="Samples"),
        slider("max_tokens", 200, 1, label="Max tokens"),
        slider("temperature", 0.8, 0.05, label="Temperature", info="0: always the most likely token"),
    ]
    seed, keep = seed_fields()
    slots.append(fault_slot())
    with gr.Accordion("More", open=False) as more:
        top_k = slider("top_k", 0, 1, label="Top-k", info="sample from the k most likely tokens; 0: from all")
        top_p = slider("top_p", 1, 0.05, label="Top-p", info="sample from the smallest set whose probabilities add up "
                       "to this; 1: from all")  # fmt: skip
        penalty = slider("repetition_penalty", 1, 0.05, label="Repetition penalty", info="1: none")
    return [*numbers, seed, top_k, top_p, penalty], keep, more


def seed_fields() -> tuple[gr.Number, gr.Checkbox]:
    """The seed, which is drawn for each text, and whether it is kept instead; entering a seed keeps it."""
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(None, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120,
                         placeholder="drawn for each text")  # fmt: skip
        keep = gr.Checkbox(False, label="Keep it", info="the same seed gives the same text", min_width=140)
    seed.input(None, None, keep, js="() => true", api_visibility="private")
    return seed, keep


def _written(version: PageVersion, prompt: Any, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Yield status, samples, an empty place, MORE, the seed, and the faults of FIELDS as the text grows.

    An error leaves the last text, which page.js marks if it is of another prompt.
    """
    *numbers, keep, number = values
    sampling = dict(zip(NUMBERS, numbers, strict=True))
    rest: tuple[Any, ...] = ()
    try:
        sampling["seed"] = chosen_seed(keep, sampling["seed"])
        for name, (low, high) in RANGES.items():  # the field beside a slider accepts any number
            check_number(name, sampling[name], low, high)
        for completion in complete(version.served(number), prompt, **sampling):
            rest = (gr.skip(),) * (1 + len(FIELDS)) if rest else (sampling["seed"], *faults(FIELDS))
            yield status_line(completion, version), samples_html(completion, str(prompt)), "", gr.skip(), *rest
    except PipelineError as error:
        hidden = isinstance(error, FieldError) and error.field in MORE
        yield gr.skip(), gr.skip(), "", gr.update(open=True) if hidden else gr.skip(), gr.skip(), *faults(FIELDS, error)


def status_line(completion: Completion, version: PageVersion) -> str:
    """Version, length, speed and novelty."""
    n, number = completion.n_tokens, version.source.current().info["version"]
    written_by = f"written by {completion.served.label}"
    if completion.served.info["version"] != number:
        written_by += f", which was served when it began; version {number} is served now"
    parts = [escape(written_by), f"<b>{counted(n, 'token')}</b>", f"<b>{completion.tokens_per_s:,.0f} tokens/s</b>"]
    if n:
        novelty = sum(completion.novelty(i) * len(ids) for i, ids in enumerate(completion.samples)) / n
        parts.append(f"<b>{novelty:.0%}</b> new")
    return status_html(*parts)


def samples_html(completion: Completion, prompt: str) -> str:
    """A box for each sample, and notes once all are finished; page.js compares `prompt` with the field."""
    samples = "".join(sample_html(completion, i) for i in range(len(completion.samples)))
    whole = f'<div class="samples" data-of="prompt" data-prompt="{escape(prompt)}">{samples}</div>'
    return whole + (_notes(completion) if completion.finished else "")


def sample_html(completion: Completion, i: int, title: str = "") -> str:
    text = marked_html(completion.served, completion.ids(i), len(completion.prompt_ids), completion.passages[i])
    title = title or (f"Sample {i + 1}" if len(completion.samples) > 1 else "Text")
    body = f'<p class="verse{"" if completion.finished else " writing"}">{text}</p>'
    return sheet(title, body, f"seed {completion.seed + i}", f"{completion.novelty(i):.0%} new")


def _notes(completion: Completion) -> str:
    """Notes on the marks and on the prompt."""
    corpus, prompt = completion.served.corpus, completion.prompt_ids
    words = note(
        f"Marked passages of {completion.served.min_passage} tokens or more are in the training text word for word: "
        "press one to see where. Shorter remainders and speakers’ names are not marked. New means that the text does "
        "not contain these words in this order, not that they are good."
    )
    at_end = corpus.ids[-len(prompt) :].tolist() == prompt  # nothing follows it there
    if prompt and not at_end and corpus.following(prompt)[0] < len(prompt):
        words += note(
            "The training text contains this prompt, but cut into other tokens, so the model may not recite what "
            "follows it."
            if completion.served.contains(prompt)
            else "The training text does not contain this prompt, so the model cannot recite what follows it."
        )
    if corpus.limits:
        words += note(f"{corpus.limits}; passages of the rest count as new.")
    if completion.notice:
        words += note(f"{completion.notice[0].upper()}{completion.notice[1:]}.")
    return words
