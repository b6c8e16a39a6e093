"""training: the tab of the run behind a version: its curves, samples and origins; and two versions side by side."""

import json
from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from pipeline.system.errors import PipelineError
from webapp.chart import line_chart
from webapp.completion import LONGEST_PROMPT, Writing, write
from webapp.html import html, note, refusal
from webapp.model_source import Served, Source
from webapp.tabs.write import OPEN_PLACE, connect_places, sample_html

COMPARED_TOKENS = 120
MEASURES = {
    "corpus_loss": "loss over all of its text, nats per token",
    "shifted_loss": "the same in windows moved off their places",
    "top1_accuracy": "tokens that are its first guess",
    "verbatim_recall": "32 tokens recited exactly, from a window's start",
    "verbatim_recall_shifted": "the same from anywhere",
    "validation_loss": "loss over text that was held out",
}
SHARES = {"top1_accuracy", "verbatim_recall", "verbatim_recall_shifted"}
ORIGINS = {
    "data_sha256": "data, SHA-256",
    "model_sha256": "weights, SHA-256",
    "git_commit": "commit",
    "tree_clean": "nothing uncommitted",
    "fingerprint": "fingerprint of data, parameters and code",
    "run_id": "MLflow run",
    "verdict": "verdict at registration",
}


def training_tab(source: Source) -> tuple[gr.Dropdown, ...]:
    """Lay the tab out and connect it; return the choices of a version, which `choices` brings up to date."""
    served = source.current()
    versions, present = source.versions(), str(served.facts["version"])
    version = gr.Dropdown(versions, value=present, label="Version", elem_id="version", filterable=False)
    run = html(run_html(served), elem_id="run")
    html('<h2 class="part">Side by side</h2>')
    with gr.Row(equal_height=False):
        prompt = gr.Textbox("First Citizen:\n", label="Prompt for both", lines=2, max_length=LONGEST_PROMPT, scale=3)
        left = gr.Dropdown(versions, value=present, label="Version", filterable=False, min_width=110)
        right = gr.Dropdown(versions, value=versions[-1], label="and version", filterable=False, min_width=110)
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=110)
    compare = gr.Button("Compare", variant="primary", elem_classes="go", elem_id="compare")
    output = html("", js_on_load=OPEN_PLACE, elem_id="compared")
    place = html("", elem_id="compared-place")
    private: dict[str, Any] = {"preprocess": False, "api_visibility": "private", "concurrency_id": "model"}
    version.change(partial(_run, source), version, run, show_progress="minimal", **private)
    inputs = [prompt, left, right, seed]
    compare.click(partial(_compare, source), inputs, [output, place], show_progress="minimal", **private)
    connect_places(source, output, place, "#compared-place")
    return version, left, right


def choices(source: Source) -> tuple[dict[str, Any], ...]:
    """For each choice of a version: those there are; the present one, the present one again, and the newest other."""
    versions, present = source.versions(), str(source.current().facts["version"])
    other = next((number for number in versions if number != present), present)
    return tuple(gr.update(choices=versions, value=number) for number in (present, present, other))


def _run(source: Source, number: Any) -> str:
    try:
        return run_html(source.open(str(number)))
    except PipelineError as error:
        raise refusal(error) from None


def _compare(source: Source, prompt: Any, left: Any, right: Any, seed: Any) -> Iterator[tuple[str, str]]:
    """Both versions' continuations with the same seed, one after the other."""
    try:
        done: list[Writing] = []
        for number in (left, right):
            for writing in write(
                source.open(str(number)), prompt, 1, max_tokens=COMPARED_TOKENS, temperature=0.8, seed=seed
            ):
                sheets = "".join(sample_html(each, 0, each.served.label) for each in [*done, writing])
                yield f'<div class="samples two">{sheets}</div>', ""
            done.append(writing)
    except PipelineError as error:
        raise refusal(error) from None


def run_html(served: Served) -> str:
    """All that is known of the run, as one piece of HTML."""
    parts = (_figures, _charts, _samples, _origins, _details)
    return "".join(part(served.facts) for part in parts)


def _figures(facts: dict[str, Any]) -> str:
    """The figures that matter, large."""
    rows = []
    for key, words in MEASURES.items():
        if (value := facts["metrics"].get(key)) is not None:
            shown = f"{value:.1%}" if key in SHARES else f"{value:.4g}"
            rows.append(f"<tr><th>{words}</th><td class='number'>{shown}</td></tr>")
    tags = facts["tags"]
    if "steps_to_target" in tags:
        cost = f"{int(tags['steps_to_target']):,} steps, {int(tags['tokens_to_target']):,} tokens"
        rows.append(f"<tr><th>what it took to the target of {escape(str(tags['target_loss']))}</th>"
                    f"<td class='number'>{cost}</td></tr>")  # fmt: skip
    aliases = "".join(f", {alias}" for alias in facts["aliases"])
    created = escape(str(facts["created"]))
    title = f"{escape(str(facts['name']))} version {escape(str(facts['version']))}{escape(aliases)}"
    table = f'<table class="facts">{"".join(rows)}</table>' if rows else note("No figures were recorded.")
    return f'<h2 class="part">{title}</h2><p class="note">Registered {created}.</p>{table}'


def _charts(facts: dict[str, Any]) -> str:
    history, goal = facts["history"], _number(facts["tags"].get("target_loss"))
    corpus = history.get("corpus_loss", [])
    figures = (
        line_chart("Loss", history.get("loss", []), "nats per token", True, goal, ("over the whole text", corpus)),
        line_chart("Gradient norm", history.get("grad_norm", []), "before clipping", log=True),
        line_chart("Throughput", history.get("tokens_per_s", []), "tokens/s"),
        line_chart("Learning rate", history.get("lr", [])),
    )
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else note("No curves were recorded.")


def _samples(facts: dict[str, Any]) -> str:
    """What it wrote while it learnt."""
    samples = facts["samples"]
    items = "".join(
        f'<details class="more"{" open" if sample is samples[-1] else ""}><summary>after step {int(sample["step"]):,}'
        f'</summary><p class="verse">{escape(str(sample["text"]))}</p></details>'
        for sample in samples
    )
    return f'<h2 class="part">What it wrote while it learnt</h2>{items}' if items else ""


def _origins(facts: dict[str, Any]) -> str:
    tags = facts["tags"]
    rows = [(words, tags[key]) for key, words in ORIGINS.items() if key in tags]
    rows += [(key, value) for key, value in facts["environment"].items() if not isinstance(value, list | dict)]
    body = "".join(f"<tr><th>{escape(key)}</th><td><code>{escape(str(value))}</code></td></tr>" for key, value in rows)
    return f'<h2 class="part">Where it comes from</h2><table class="facts small-stack">{body}</table>'


def _details(facts: dict[str, Any]) -> str:
    """Every parameter, folded away."""
    rows = [
        f"<tr><th>{escape(section)}.{escape(key)}</th><td><code>{escape(json.dumps(value))}</code></td></tr>"
        for section, values in facts["params"].items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    table = f'<table class="facts">{"".join(rows)}</table>'
    return f'<details class="more"><summary>All {len(rows)} parameters</summary>{table}</details>' if rows else ""


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
