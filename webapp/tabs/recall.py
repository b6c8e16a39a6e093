"""The tab Recall: the model's loss on each token of the training text, and the part that it recites."""

import math
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import partial
from html import escape
from itertools import zip_longest
from typing import Any

import gradio as gr

from pipeline.data.statistics import bits_per_byte
from pipeline.model.sampling import Sampling
from pipeline.system.errors import PipelineError
from webapp.events import event_options
from webapp.fields import FieldError, checked_int
from webapp.html import fault_slot, faults, heading, html, note, sheet, split_text, status_html
from webapp.model_source import Served
from webapp.page_version import PageVersion

GIVEN = 32  # tokens of the prompt for a recital
MAX_WORDS = 200  # characters to search for
DARKEST = 6.0  # loss in nats from which on the colour is darkest


def recall_tab(page: gr.Blocks, version: PageVersion) -> None:
    served = version.source.current()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            words = gr.Textbox("", label="Find words in the training text", placeholder="hear me speak",
                               max_length=MAX_WORDS, elem_id="words")  # fmt: skip
            words_fault = fault_slot()
            find = gr.Button("Find next", elem_classes="go", elem_id="find")
            place = gr.Slider(
                0, last_place(served), 0, step=1, label="Place in the text, in tokens", elem_id="place-in-text"
            )
            place_fault, hint = fault_slot(), html(_hint(served))
        with gr.Column(scale=3, min_width=300):
            heat, recital = html("", elem_id="heat"), html("", elem_id="recital")
    shown = [heat, recital, place_fault]
    options = event_options("model", heat, trigger_mode="always_last")
    recall, given = partial(_recall, version), [place, words, version.number]
    place.change(recall, given, shown, **options)
    for pressed in (find.click, words.submit):
        found = pressed(partial(_find, version), [words, place, version.number], [place, words_fault], **options)
        found.then(recall, given, shown, **options)
    version.number.change(recall, given, shown, **options)
    version.renders(
        lambda served: (gr.update(maximum=last_place(served)), _hint(served), status_html("reading …"), ""),
        place, hint, heat, recital,
    )  # fmt: skip


def _hint(served: Served) -> str:
    return note(
        f"The colours show the model’s loss on the text from this place on, given the {served.window // 2} tokens "
        f"before it. The recital starts from the text’s next {GIVEN} tokens alone."
    ) + (note(f"{served.corpus.limits}.") if served.corpus.limits else "")


def last_place(served: Served) -> int:
    """The last token of the text that another one follows."""
    return max(0, len(served.ids) - 2)


def _recall(version: PageVersion, place: Any, words: Any, number: Any) -> Iterator[tuple[str, ...]]:
    """The heat map, then the heat map with the recital; the last value is the fault of the place."""
    try:
        served = version.served(number)
        start = checked_int("place", place, 0, last_place(served))
        heat = heat_html(served, start, words if isinstance(words, str) else "")
        yield heat, status_html("reciting …"), ""
        yield heat, recital_html(served, served.ids[start : start + served.window + 1].tolist()), ""
    except PipelineError as error:
        yield "", "", *faults(["place"], error)


def _find(version: PageVersion, words: Any, place: Any, number: Any) -> tuple[Any, str]:
    """The place of the next occurrence of the words after `place`, and the fault of the words."""
    try:
        served = version.served(number)
        if not isinstance(words, str) or not words.strip() or len(words) > MAX_WORDS:
            fault = f"no words to search for: enter 1 to {MAX_WORDS} characters"
            raise FieldError(fault, "words", fault)
        after = place if isinstance(place, int | float) and 0 <= place <= last_place(served) else -1
        found = served.find(words, int(after))
        if found is None:
            fault = f"“{words[:40]}” is not in the training text: try fewer words"
            raise FieldError(fault, "words", fault)
        return min(found[0], last_place(served)), ""
    except PipelineError as error:
        return gr.skip(), *faults(["words"], error)


def heat_html(served: Served, place: int, words: str) -> str:
    """A heat map of the text from `place` on: the darker, the higher the loss, given the half window before it."""
    context = min(place, served.window // 2)
    ids = served.ids[place - context : place - context + served.window + 1].tolist()
    first = max(1, context)  # the first token with a loss
    losses = served.generator.token_losses(ids)[first - 1 :]
    begin, *texts = split_text(served.tokenizer, ids, range(first, len(ids)))
    found = range(*(served.find(words.strip(), place - 1) or (0,)))
    spans = [escape(begin)] if context == 0 else []  # the first token of the text has no loss
    for n, (text, loss) in enumerate(zip(texts, losses, strict=True), start=place - context + first):
        name = ' class="found"' if n in found else ""
        title = f"loss {loss:.2f} nats, probability {100 * math.exp(-loss):.3g}%"
        spans.append(f'<span{name} style="--loss:{min(loss / DARKEST, 1) ** 0.7:.2f}" title="{title}">'
                     f"{escape(text)}</span>")  # fmt: skip
    mean = sum(losses) / len(losses)
    known = sum(loss < math.log(2) for loss in losses) / len(losses)
    n_bytes = len(served.tokenizer.decode_bytes(i for i in ids[first:] if i != served.tokenizer.eot))
    bits = f", {bits:.2f} bits per byte" if (bits := bits_per_byte(mean, n_bytes / len(losses))) is not None else ""
    body = (
        f'<p class="heat">{"".join(spans)}</p><div class="scale"><span>known</span><i></i><span>surprising</span></div>'
    )
    return sheet("The model’s loss on the training text", body, f"tokens {place:,}–{place - context + len(ids) - 1:,}",
                 f"mean loss {mean:.2f} nats{bits}", f"{known:.0%} with a probability above 50%")  # fmt: skip


def recital_html(served: Served, ids: list[int]) -> str:
    """The text after the first tokens, to the end of its document, beside the model's greedy completion of them."""
    given, eot = min(GIVEN, len(ids) // 2), served.tokenizer.eot
    prompt, truth = ids[:given], ids[given:]
    truth = truth[: truth.index(eot) + 1] if eot in truth else truth
    pieces = served.engine.stream([prompt], Sampling.of(max_tokens=len(truth), temperature=0))
    recited = [i for piece in pieces for i in (*piece.ids, *[eot] * (piece.finished == "end"))]
    first_error = next((n for n, (a, b) in enumerate(zip_longest(truth, recited)) if a != b), len(truth))
    verdict = "all correct" if first_error == len(truth) else f"{first_error} correct before the first error"
    changes = SequenceMatcher(None, truth, recited, autojunk=False).get_opcodes()
    text = _compared(served, prompt, truth, [(kind, a, b) for kind, a, b, _, _ in changes], "del")
    model = _compared(served, prompt, recited, [(kind, c, d) for kind, _, _, c, d in changes], "ins")
    sheets = sheet("The text", text) + sheet("The model", model)
    status = f"Given the first <b>{given}</b> tokens, the model recites the next <b>{len(truth)}</b>: <b>{verdict}</b>."
    return f'{heading("Recital")}{status_html(status)}<div class="samples two">{sheets}</div>'


def _compared(served: Served, prompt: list[int], ids: list[int], changes: list[tuple[str, int, int]], tag: str) -> str:
    """The text of `prompt` and of `ids`, with the differences in `tag`."""
    places = range(len(prompt), len(prompt) + len(ids))
    given, *texts = map(escape, split_text(served.tokenizer, [*prompt, *ids], places))
    parts = ((kind, "".join(texts[begin:end])) for kind, begin, end in changes)
    body = "".join(part if kind == "equal" or not part else f"<{tag}>{part}</{tag}>" for kind, part in parts)
    return f'<p class="verse"><span class="prompt">{given}</span>{body}</p>'
