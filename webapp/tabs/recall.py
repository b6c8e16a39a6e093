"""memory: the tab that lays the model beside its training text: how well it knows each token, what it recites."""

import math
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import partial
from html import escape
from itertools import zip_longest
from typing import Any, NamedTuple

import gradio as gr

from pipeline.model.sampling import Sampling
from pipeline.system.errors import InputError, PipelineError
from webapp.completion import checked_whole
from webapp.html import cut, html, note, refusal
from webapp.model_source import Served, Source

GIVEN = 32  # tokens that the model is given before it recites
DARKEST = 6.0  # nats from which on a token is as dark as can be


class Fields(NamedTuple):
    """What the page fills when it is opened."""

    window: gr.Slider  # its range is the served text's
    heat: gr.HTML
    recital: gr.HTML


def memory_tab(source: Source) -> Fields:
    """Lay the tab out and connect it."""
    served = source.current()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            words = gr.Textbox("", label="Find words in the training text", placeholder="hear me speak", max_length=200,
                               elem_id="words")  # fmt: skip
            find = gr.Button("Find next", elem_classes="go", elem_id="find")
            window = gr.Slider(1, n_windows(served), 1, step=1, label="Window of the text", elem_id="window")
            shift = gr.Slider(0, served.window - 1, 0, step=1, label="Shifted by, in tokens", elem_id="shift")
            html(note(_about_windows(served)))
            html(note(f"{served.corpus.limits}.") if served.corpus.limits else "")
        with gr.Column(scale=3, min_width=300):
            heat = html("", elem_id="heat")
            recital = html("", elem_id="recital")
    events: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "concurrency_id": "model"}
    events |= {"api_visibility": "private", "trigger_mode": "always_last"}
    look = partial(_look, source)
    for slider in (window, shift):
        slider.change(look, [window, shift, words], [heat, recital], **events)
    found = partial(_find, source)
    for pressed in (find.click, words.submit):
        pressed(found, [words, window, shift], [window, shift], **events).then(
            look, [window, shift, words], [heat, recital], **events
        )
    return Fields(window, heat, recital)


def n_windows(served: Served) -> int:
    return max(1, math.ceil((len(served.ids) - 1) / served.window))


def first_look(source: Source) -> Iterator[tuple[str, str]]:
    """What the tab shows to begin with."""
    yield from _look(source, 1, 0, "")


def _about_windows(served: Served) -> str:
    """Why a shift matters, where the training had fixed windows."""
    if served.facts["params"].get("windows", {}).get("order") == "random":
        return f"A window has {served.window} tokens. The model was trained on windows from anywhere in the text."
    return (
        f"The model was trained on windows of {served.window} tokens, always cut at the same places. Shift 0 shows one "
        "just as it was learnt. Shift it, and the same words stand at other positions: what was learnt by heart there "
        "can be lost, and the text takes colour."
    )


def _look(source: Source, window: Any, shift: Any, words: Any) -> Iterator[tuple[str, str]]:
    """The heat map at once, then with what the model recites."""
    served = source.current()
    try:
        number = checked_whole("window", window, 1, n_windows(served))
        start = (number - 1) * served.window + checked_whole("shift", shift, 0, served.window - 1)
        ids = served.ids[start : start + served.window + 1].tolist()
        if len(ids) < 2:
            yield note(f"The text ends here: window {number} has no tokens after this shift."), ""
            return
        heat = heat_html(served, ids, start, words if isinstance(words, str) else "")
        yield heat, '<p class="status">reciting …</p>'
        yield heat, recital_html(served, ids)
    except PipelineError as error:
        raise refusal(error) from None


def _find(source: Source, words: Any, window: Any, shift: Any) -> tuple[int, int]:
    """The window and shift 0 of the next place where the words stand."""
    served = source.current()
    try:
        if not isinstance(words, str) or not words.strip() or len(words) > 200:
            raise InputError("nothing to look for: give some words, 200 characters at most")
        number = checked_whole("window", window, 1, n_windows(served))
        place = served.find(words, number * served.window + 1)
        if place is None:
            raise InputError(f"{words[:40]!r} stands nowhere in the training text: try fewer words")
    except PipelineError as error:
        raise refusal(error) from None
    return min(max(place[0] - 1, 0) // served.window + 1, n_windows(served)), 0


def heat_html(served: Served, ids: list[int], start: int, words: str) -> str:
    """The text of `ids`, each token but the first as dark as it surprises the model."""
    losses = served.generator.token_losses(ids)
    first, *texts = cut(served.tokenizer, ids, range(1, len(ids)))
    found = served.find(words, start - 1) if words.strip() else None
    marked = range(*found) if found else range(0)
    spans = [escape(first)]
    for n, (text, loss) in enumerate(zip(texts, losses, strict=True), start=start + 1):
        name = ' class="found"' if n in marked else ""
        title = f"{loss:.2f} nats: the model gave this {100 * math.exp(-loss):.3g}%"
        spans.append(f'<span{name} style="--loss:{min(loss / DARKEST, 1) ** 0.7:.2f}" title="{title}">'
                     f"{escape(text)}</span>")  # fmt: skip
    mean = sum(losses) / len(losses)
    sure = sum(loss < math.log(2) for loss in losses) / len(losses)
    return (
        '<article class="sheet"><header><b>The training text, as the model knows it</b>'
        f"<span>tokens {start:,}–{start + len(ids) - 1:,}</span><span>mean loss {mean:.2f} nats</span>"
        f'<span>{sure:.0%} known, at better than even odds</span></header><p class="heat">{"".join(spans)}</p>'
        '<div class="scale"><span>known</span><i></i><span>surprising</span></div></article>'
    )


def recital_html(served: Served, ids: list[int]) -> str:
    """The text after its first tokens, beside what the model makes of them when it takes the likeliest each time."""
    given = recitable(served, ids, min(GIVEN, len(ids) // 2))
    truth = ids[given:]
    prompt = served.tokenizer.decode(ids[:given])
    pieces = served.generator.stream([prompt], Sampling.of(max_tokens=len(truth), temperature=0))
    recited = [i for piece in pieces for i in piece.ids]
    slip = next((n for n, (a, b) in enumerate(zip_longest(truth, recited)) if a != b), len(truth))
    changes = SequenceMatcher(None, truth, recited, autojunk=False).get_opcodes()
    verdict = "every one right" if slip == len(truth) else f"{slip} right before the first slip"
    text = _compared(served, truth, [(a, b, kind != "equal") for kind, a, b, _, _ in changes], "del")
    model = _compared(served, recited, [(c, d, kind != "equal") for kind, _, _, c, d in changes], "ins")
    sheets = "".join(
        f'<article class="sheet"><header><b>{title}</b></header><p class="verse"><span class="prompt">{escape(prompt)}'
        f"</span>{body}</p></article>"
        for title, body in (("The text", text), ("The model", model))
    )
    return (
        f'<h2 class="part">Recital</h2><p class="status"><span>Given the first <b>{given}</b> tokens, the model goes '
        f'on for <b>{len(truth)}</b>: <b>{verdict}</b>.</span></p><div class="samples two">{sheets}</div>'
    )


def recitable(served: Served, ids: list[int], given: int) -> int:
    """The largest number of tokens, `given` at most, whose text is read as the very same tokens again.

    A text that is cut within a line may be: two newlines at its end, for one, would become a single token.
    """
    for n in range(given, 1, -1):
        if served.tokenizer.encode(served.tokenizer.decode(ids[:n])) == ids[:n]:
            return n
    return 1


def _compared(served: Served, ids: list[int], spans: list[tuple[int, int, bool]], tag: str) -> str:
    """The text of `ids`, what is not the other side's within `tag`."""
    spans = [span for span in spans if span[0] < span[1]]
    texts = cut(served.tokenizer, ids, [begin for begin, _, _ in spans[1:]])
    return "".join(
        f"<{tag}>{escape(text)}</{tag}>" if differs else escape(text)
        for text, (_, _, differs) in zip(texts, spans, strict=False)
    )
